"""`diptych serve`: an encoder-decoder behind OpenAI's HTTP interface, for clients that know that one.

    diptych serve runs/full/final --port 8000
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "final", "prompt": "Name the capital.", "input": "France"}'

    POST /v1/completions         a prompt is an instruction, which the checkpoint's template makes a source of, as for
                                 `diptych generate`; `input`, `system`, `source_language` and `target_language` may
                                 stand beside it
    POST /v1/chat/completions    messages; the next answer is written
    GET  /v1/models, /health, /metrics (Prometheus)

Greedy unless a temperature is asked for, and then the text is that of `diptych generate`, however many clients there
are: batching.py. A null field counts as absent. A field that asks for what the server cannot do (tools, images) is
refused by name. Beyond the loopback a token is needed, from the environment: DIPTYCH_TOKEN. No text of a request is
written anywhere.
"""

import asyncio
import hmac
import itertools
import json
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.conversations import MARKS, MARKS_NOT_READ, Fault
from diptych.data_prep.rows.language_names import SOURCE_COLUMNS, TARGET_COLUMNS
from diptych.data_prep.rows.records import Languages, broken_character
from diptych.data_prep.text_to_ids.languages import codes_of, languages_note
from diptych.finetune.commands import cli
from diptych.finetune.inference.generation_config import DEFAULT_NEW_TOKENS
from diptych.finetune.inference.prompts import Prompt, Prompter, prompt_of, template_for
from diptych.finetune.inference.targets import given_tokens
from diptych.finetune.model.loading import load_checkpoint, pick_device, position_limit
from diptych.finetune.serving.request_batches import (
    Answer,
    Decoding,
    Ended,
    Engine,
    Failed,
    Job,
    Piece,
    QueueFull,
    show_place,
)
from diptych.finetune.serving.serve_settings import ServeSettings
from diptych.finetune.serving.web_address import address, is_asked_here, listen, need_secret, run_until_signal

INSTALL = "pip install 'diptych[serve]'"
TOKEN_VARIABLE = "DIPTYCH_TOKEN"
LARGEST_BODY = 4_000_000
"""Bytes."""
MOST_PROMPTS = 64
MOST_ANSWERS = 16
RETRY_SECONDS = 1

LANGUAGES = (*SOURCE_COLUMNS[:2], *TARGET_COLUMNS[:2])
KNOWN = {"model", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", *LANGUAGES}
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
"""The same under its old and its new name."""
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls", "prediction"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}
"""Whatever their values, the text of the answer is the same."""
HARMLESS: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "response_format": ({"type": "text"},),
    "stream_options.include_obfuscation": (False,),
}
"""Fields that may be given with a value that asks for nothing."""
LEAST_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken: logits that are divided by less can overflow float32."""
LARGEST_INTEGER = 2**63 - 1
LONGEST_MESSAGE = 600
"""Characters of an error, which may quote a client."""


class RequestError(Exception):
    """What a client did wrong, or the server cannot do now: an HTTP status, OpenAI's kind, and the field."""

    def __init__(self, status: int, message: str, param: str | None = None, kind: str = "invalid_request_error"):
        super().__init__(_short(message, LONGEST_MESSAGE))
        self.status, self.param, self.kind = status, param and _short(param), kind

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": None}}


class Ask:
    """One request, checked: its prompts as token ids, and how they are answered."""

    def __init__(self, body: dict[str, Any], service: "Service", is_chat: bool):
        self.is_chat = is_chat
        self.service = service
        body = _given(body)
        # True asks for the log-probability of each token in a chat, and 0 (other tokens beside it) in a completion.
        has_scores = body.get("logprobs") is True if is_chat else type(body.get("logprobs")) is int
        own = {"messages", *(["logprobs"] if has_scores else [])} if is_chat else {"prompt", "input", "system"}
        _check_fields(body, KNOWN | {*TOKEN_LIMITS} | own)
        model = _field(body, "model", str, service.name)
        service.check_model(model)
        self.stream = _field(body, "stream", bool, False)
        options = _given(_field(body, "stream_options", dict, {}))
        _check_fields(options, {"include_usage"}, "stream_options.")
        self.include_usage = _field(options, "include_usage", bool, False)
        if has_scores and self.stream:
            raise RequestError(
                400, "'logprobs' are known when all is written. Ask for them without 'stream'.", "logprobs"
            )
        self.decoding = _decoding(body, service.max_new_tokens)._replace(scores=has_scores)
        self.sources, self.given = service.sources(_rows(body, is_chat))
        self.begun: set[int] = set()  # of the answers, those of which a client was told who speaks
        self.id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.sources))

    def whole(self, answers: list[list[Answer]]) -> dict[str, Any]:
        flat = [answer for of_prompt in answers for answer in of_prompt]
        choices = [
            self._choice(index, answer.text, _reason(answer), "message") | self._scores(answer)
            for index, answer in enumerate(flat)
        ]
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._envelope(kind) | {"choices": choices, "usage": self.usage(flat)}

    def chunk(self, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return self._envelope(kind) | {"choices": [self._choice(index, text, reason, "delta")]}

    def last_chunk(self, answers: list[Answer]) -> dict[str, Any]:
        return self.chunk(0, "") | {"choices": [], "usage": self.usage(answers)}

    def usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        written = sum(answer.tokens for answer in answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def _scores(self, answer: Answer) -> dict[str, Any]:
        if not self.decoding.scores:
            return {}
        texts, nats = zip(*answer.scored, strict=True) if answer.scored else ((), ())
        if self.is_chat:
            parts = [
                {"token": text, "logprob": score, "bytes": list(text.encode()), "top_logprobs": []}
                for text, score in answer.scored
            ]
            return {"logprobs": {"content": parts}}
        offsets = itertools.accumulate(map(len, texts[:-1]), initial=0)
        found = {"tokens": texts, "token_logprobs": nats, "text_offset": list(offsets), "top_logprobs": None}
        return {"logprobs": found}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.name}

    def _choice(self, index: int, text: str, reason: str | None, place: str) -> dict[str, Any]:
        if self.is_chat:
            speaker = {} if place == "delta" and index in self.begun else {"role": "assistant"}
            self.begun.add(index)
            return {"index": index, place: speaker | {"content": text}, "finish_reason": reason}
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": None}


def _reason(answer: Answer) -> str:
    return "stop" if answer.finished else "length"


def _short(text: str, characters: int = 60) -> str:
    return text if len(text) <= characters else f"{text[:characters]} …"


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _check_fields(fields: dict[str, Any], known: set[str], inside: str = "") -> None:
    """RequestError for the first field that asks for what is not done. `inside` is the path of their object."""
    for name, value in fields.items():
        harmless = HARMLESS.get(f"{inside}{name}", ())
        if name not in known | IGNORED and value not in harmless:
            more = f", or give {' or '.join(map(json.dumps, harmless))}" if harmless else ""
            message = f"'{inside}{_short(name)}' asks for something that is not done here. Leave it out{more}."
            raise RequestError(400, message, f"{inside}{name}")


def _field(body: dict[str, Any], name: str, kind: type | tuple[type, ...], default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        due = " or ".join(one.__name__ for one in kinds)
        raise RequestError(400, f"{name!r} is {_short(json.dumps(value))}; it must be of type {due}.", name)
    return value


def _number(body: dict[str, Any], name: str, kind: type | tuple[type, ...], default: Any, low: Any, high: Any) -> Any:
    value = _field(body, name, kind, default)
    if value is not None and not low <= value <= high:
        raise RequestError(400, f"{name!r} is {value}; it is a number from {low} to {high}.", name)
    return value


def _decoding(body: dict[str, Any], most_tokens: int) -> Decoding:
    limits = [_number(body, name, int, most_tokens, 1, LARGEST_INTEGER) for name in TOKEN_LIMITS]
    temperature = float(_number(body, "temperature", (int, float), 0, 0, 2))
    temperature = temperature if temperature >= LEAST_TEMPERATURE else 0.0
    top_p = float(_number(body, "top_p", (int, float), 1, 0, 1))
    count = _number(body, "n", int, 1, 1, MOST_ANSWERS)
    if count > 1 and not temperature:
        raise RequestError(400, "'n' above 1 without a temperature would be one answer several times. Give one.", "n")
    stop = _field(body, "stop", (str, list), [])
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > 16 or not all(isinstance(text, str) and text for text in stop):
        raise RequestError(400, "'stop' is a text that is not empty, or a list of up to 16 of them.", "stop")
    seed = _number(body, "seed", int, None, -LARGEST_INTEGER - 1, LARGEST_INTEGER)
    if not temperature:  # then these decide nothing, and prompts can share a batch
        top_p, seed = 1.0, None
    return Decoding(min(most_tokens, *limits), temperature, top_p, count, tuple(stop), seed)


def _rows(body: dict[str, Any], is_chat: bool) -> list[dict[str, Any]]:
    """What is asked, as rows of `diptych generate --in_file`."""
    languages = {name: _field(body, name, str, "") for name in LANGUAGES if body.get(name)}
    if is_chat:
        messages = _field(body, "messages", list, None)
        if not messages:
            raise RequestError(400, "'messages' is missing or empty. Give a list of {role, content}.", "messages")
        turns = [_turn(message) for message in messages]
        if isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
            where = f"messages[{len(turns) - 1}]"
            raise RequestError(
                400, f"'{where}' is an assistant turn, and answers are not continued. End with a user turn.", where
            )
        return [{"messages": turns} | languages]
    prompts = _field(body, "prompt", (str, list), None)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    more = {name: _field(body, name, str, "") for name in ("input", "system")}
    are_texts = prompts and all(isinstance(it, str) and (it.strip() or more["input"]) for it in prompts)
    if not are_texts or len(prompts) > MOST_PROMPTS:
        message = f"'prompt' is a text that is not empty, or a list of 1 to {MOST_PROMPTS} of them (no token ids)."
        raise RequestError(400, message, "prompt")
    return [{"instruction": prompt} | more | languages for prompt in prompts]


def _turn(message: Any) -> Any:
    """The message without null fields and without marks for training. An assistant's content may be absent."""
    if not isinstance(message, dict):
        return message
    turn = {name: message[name] for name in _given(message).keys() - MARKS.keys() - MARKS_NOT_READ.keys()}
    return {"content": turn.get("refusal", "")} | turn if turn.get("role") == "assistant" else turn


def _as_input(prompt: Prompt, prompter: Prompter) -> Prompt:
    """Where T5's words for the languages say what is to be done, a prompt is the text to translate, no instruction."""
    has_words = codes_of(prompter.tokenizer).layout == "words"
    if prompt.input or not has_words or not prompt.languages.or_else(prompter.languages).direction:
        return prompt
    return prompt._replace(instruction="", input=prompt.instruction)


class Service:
    """The model, what is counted, and an answer for each path."""

    def __init__(self, settings: ServeSettings, engine: Engine, prompter: Prompter, max_new_tokens: int):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.settings, self.engine, self.prompter = settings, engine, prompter
        self.name, self.max_new_tokens = settings.model_name, max_new_tokens
        self.is_closing = False
        self.registry = CollectorRegistry()
        kept = {"registry": self.registry}
        self.requests = Counter("diptych_requests", "Requests by path and status.", ["path", "status"], **kept)
        self.dropped = Counter("diptych_dropped", "Requests whose client went, or whose time was over.", **kept)
        self.read = Counter("diptych_prompt_tokens", "Tokens of prompts.", **kept)
        self.written = Counter("diptych_generated_tokens", "Tokens generated.", **kept)
        self.seconds = Histogram("diptych_request_seconds", "From a request to the end of its answer.", **kept)
        self.first = Histogram("diptych_first_text_seconds", "From a request to its first streamed text.", **kept)
        sizes = [1, 2, 4, 8, 16, 32, 64, 128]
        engine.on_batch = Histogram("diptych_batch_rows", "Prompts of a batch.", buckets=sizes, **kept).observe
        Gauge("diptych_queue_depth", "Prompts that wait.", **kept).set_function(lambda: engine.waiting)
        running = Gauge("diptych_running_rows", "Prompts that are being answered.", **kept)
        running.set_function(lambda: sum(not job.is_dropped for job in engine.running))

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise RequestError(404, f"there is no model '{_short(name)}' here; this is {self.name!r}.", "model")

    def sources(self, rows: list[dict[str, Any]]) -> tuple[list[list[int]], list[list[int]]]:
        """Rendered by the template and encoded, as `diptych generate` does it; and what the decoder is given first."""
        prompter, model = self.prompter, self.engine.model
        column = "messages" if "messages" in rows[0] else "prompt"
        try:
            texts, languages = zip(
                *(prompter.render(_as_input(prompt_of(row), prompter)) for row in rows), strict=True
            )
            found, is_cut = prompter.encode(texts, languages)
        except (UserError, Fault) as error:
            raise RequestError(400, str(error), error.field if isinstance(error, Fault) else column) from None
        if any(is_cut):
            limit = self.prompter.max_source_tokens
            raise RequestError(400, f"the prompt has more than {limit} tokens, which is all that is read.", column)
        return found, [given_tokens(model, prompter.tokenizer, prompter.template, of_row) for of_row in languages]

    def submit(self, ask: Ask) -> tuple[list[Job], asyncio.Queue]:
        """The jobs, and a queue of (place of the job, event)."""
        loop, events, most = asyncio.get_running_loop(), asyncio.Queue(), self.settings.queue
        if len(ask.sources) > most:
            message = f"the request has {len(ask.sources)} prompts, but only {most} can wait. Send fewer at once."
            raise RequestError(400, message, "prompt")

        def to_queue(place: int):
            return lambda event: loop.call_soon_threadsafe(events.put_nowait, (place, event))

        jobs = [
            Job(ids, ask.decoding, to_queue(place), ask.stream, given=given)
            for place, (ids, given) in enumerate(zip(ask.sources, ask.given, strict=True))
        ]
        try:
            self.engine.submit(jobs)
        except QueueFull:
            raise RequestError(503, f"up to {most} prompts wait already. Come again.", kind="overloaded") from None
        self.read.inc(ask.prompt_tokens)
        return jobs, events

    async def whole(self, ask: Ask, jobs: list[Job], events: asyncio.Queue) -> dict[str, Any]:
        answers: list[list[Answer]] = [[] for _ in jobs]
        for _ in jobs:
            place, event = await events.get()
            answers[place] = _answers(event)
        self._count(ask, jobs, answers)
        return ask.whole(answers)

    async def streamed(self, ask: Ask, jobs: list[Job], events: asyncio.Queue) -> AsyncIterator[dict[str, Any]]:
        """OpenAI's chunks: one for each piece, one that ends each answer, and the usage if it was asked for."""
        answers: list[list[Answer]] = [[] for _ in jobs]
        open_jobs, has_begun = len(jobs), False
        until = jobs[0].created + self.settings.timeout
        while open_jobs:
            place, event = await asyncio.wait_for(events.get(), until - time.monotonic())
            first = place * ask.decoding.n
            if isinstance(event, Piece):
                if not has_begun:
                    self.first.observe(time.monotonic() - jobs[0].created)
                has_begun = True
                yield ask.chunk(first + event.index, event.text)
                continue
            answers[place] = _answers(event)
            open_jobs -= 1
            for index, answer in enumerate(answers[place]):
                yield ask.chunk(first + index, "", _reason(answer))
        self._count(ask, jobs, answers)
        if ask.include_usage:
            yield ask.last_chunk([answer for of_prompt in answers for answer in of_prompt])

    def _count(self, ask: Ask, jobs: list[Job], answers: list[list[Answer]]) -> None:
        self.written.inc(sum(answer.tokens for of_prompt in answers for answer in of_prompt))
        self.seconds.observe(time.monotonic() - jobs[0].created)

    def close(self) -> None:
        """What was begun is ended, and no more begun."""
        self.is_closing = True

    def metrics(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)


def _answers(event: Ended | Failed) -> list[Answer]:
    if isinstance(event, Failed):
        raise _failure(event.error)
    return event.answers


def _failure(error: Exception) -> RequestError:
    """The server's own failure: the request has passed all checks."""
    message = str(error) if isinstance(error, UserError) else f"the server failed: {type(error).__name__}"
    return RequestError(500, message, kind="server_error")


def build_app(service: Service, token: str | None):
    """The ASGI application."""
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    def count(path: str, status: int) -> None:
        service.requests.labels(path if path in paths else "elsewhere", status).inc()
        service.dropped.inc(status in (499, 504))

    async def refuse(request: Request, error: RequestError) -> Response:
        count(request.scope["path"], error.status)
        headers = {503: {"Retry-After": str(RETRY_SECONDS)}, 401: {"WWW-Authenticate": "Bearer"}}
        return JSONResponse(error.body(), error.status, headers.get(error.status))

    def admit(request: Request, needs_token: bool = True) -> None:
        """Without a token, only this machine, and no page of another site that a browser on it has open."""
        if token is None:
            if not is_asked_here(request.headers):
                message = (
                    f"asked for as another host than this one, or by a page of one. Set {TOKEN_VARIABLE} to allow it."
                )
                raise RequestError(403, message)
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_known = hmac.compare_digest(given.strip().encode("latin-1"), os.fsencode(token))
        if needs_token and not (scheme.lower() == "bearer" and is_known):
            message = f"a token is needed: Authorization: Bearer …, as in {TOKEN_VARIABLE} of the server."
            raise RequestError(401, message, kind="authentication_error")

    async def body_of(request: Request) -> dict[str, Any]:
        data = b""
        async for part in request.stream():
            data += part
            if len(data) > LARGEST_BODY:
                raise RequestError(413, f"the request has more than {LARGEST_BODY:,} bytes. Send less at once.")
        try:
            body = json.loads(data)
        except RecursionError:
            raise RequestError(400, "the request is nested too deeply.") from None
        except ValueError as error:
            raise RequestError(400, f"the request is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise RequestError(400, f"the request must be a JSON object, and is {type(body).__name__}.")
        if broken := broken_character(json.dumps(body, ensure_ascii=False)):
            raise RequestError(400, f"the request holds {broken}")
        return body

    async def complete(request: Request) -> Response:
        admit(request)
        if service.is_closing:
            raise RequestError(503, "the server is about to end. Come again.", kind="overloaded")
        path, jobs = request.scope["path"], []
        try:
            ask = Ask(await body_of(request), service, is_chat="chat" in path)
            jobs, events = service.submit(ask)
            if ask.stream:
                return StreamingResponse(stream(path, ask, jobs, events), media_type="text/event-stream")
            answer = await until_gone(request, service.whole(ask, jobs, events))
        except Exception as error:
            drop(jobs)
            raise refusal(error) from None
        count(path, 200)
        return JSONResponse(answer)

    def drop(jobs: list[Job]) -> None:
        for job in jobs:
            job.is_dropped = True

    def refusal(error: Exception) -> RequestError:
        if isinstance(error, RequestError):
            return error
        if isinstance(error, ClientDisconnect):
            return RequestError(499, "the client has gone.")
        if isinstance(error, asyncio.TimeoutError):
            return timed_out()
        show_place(error)
        return _failure(error)

    def timed_out() -> RequestError:
        seconds = service.settings.timeout
        return RequestError(504, f"no answer within {seconds:g} seconds. Ask for fewer tokens.", kind="timeout")

    async def until_gone(request: Request, answer) -> dict[str, Any]:
        """The answer; asyncio.TimeoutError if it takes too long, ClientDisconnect if nobody waits for it any more."""
        answering = asyncio.ensure_future(answer)
        leaving = asyncio.ensure_future(gone(request))
        limit = service.settings.timeout
        await asyncio.wait({answering, leaving}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if answering.done():
            return answering.result()
        answering.cancel()
        raise ClientDisconnect if leaving.done() and not leaving.cancelled() else asyncio.TimeoutError

    async def gone(request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def stream(path: str, ask: Ask, jobs: list[Job], events: asyncio.Queue) -> AsyncIterator[str]:
        status = 499  # unless set below: when the client goes, this generator is closed
        try:
            async for chunk in service.streamed(ask, jobs, events):
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            status = 200
            yield "data: [DONE]\n\n"
        except Exception as error:
            refused = refusal(error)
            status = refused.status
            yield f"data: {json.dumps(refused.body())}\n\n"
        finally:
            drop(jobs)
            count(path, status)

    async def models(request: Request) -> Response:
        """The only one there is, in a list or by its name."""
        admit(request)
        found = {"id": service.name, "object": "model", "created": 0, "owned_by": "diptych"}
        if (name := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": [found]})
        service.check_model(name)
        return JSONResponse(found)

    async def health(request: Request) -> Response:
        admit(request, needs_token=False)
        state = "closing" if service.is_closing else "ok"
        return JSONResponse({"status": state, "model": service.name}, 503 if service.is_closing else 200)

    async def metrics(request: Request) -> Response:
        admit(request)
        return Response(service.metrics(), media_type="text/plain; version=0.0.4")

    async def nothing(request: Request, error: Exception) -> Response:
        there = ", ".join(f"{'POST' if 'POST' in route.methods else 'GET'} {route.path}" for route in routes)
        return await refuse(request, RequestError(error.status_code, f"there are {there}.", kind="not_found"))

    routes = [
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    paths = {route.path for route in routes}
    return Starlette(routes=routes, exception_handlers={404: nothing, 405: nothing, RequestError: refuse})


def run(settings: ServeSettings) -> int:
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed. `diptych serve` needs it: {INSTALL}") from error
    token = os.environ.get(TOKEN_VARIABLE) or None
    need_secret(settings.host, token, TOKEN_VARIABLE)
    listener = listen(settings.host, settings.port)  # before the model, which takes longer
    device = pick_device(settings.device)
    loaded = load_checkpoint(settings.model, settings.dtype, device, template=settings.template)
    model, tokenizer = loaded.model, loaded.tokenizer
    template = template_for(settings.template, tokenizer)
    languages = Languages(settings.source_language, settings.target_language)
    limit = position_limit(model)
    prompter = Prompter(
        tokenizer, template, settings.max_source_tokens or position_limit(model, of_source=True), languages
    )
    if note := languages_note(tokenizer, languages):
        print(f"({note})", file=sys.stderr)
    most = settings.max_new_tokens or min(DEFAULT_NEW_TOKENS, limit or DEFAULT_NEW_TOKENS)
    sizes = {"batch_size": settings.batch_size, "queue_size": settings.queue, "batch_wait_ms": settings.batch_wait_ms}
    engine = Engine(model, tokenizer, template, **sizes)
    service = Service(settings, engine, prompter, most)

    message = f"{settings.model_name} on {device}: {address(listener)}/v1"
    run_until_signal(build_app(service, token), listener, message, settings.timeout, on_signal=service.close)
    engine.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("serve", argv)


if __name__ == "__main__":
    raise SystemExit(main())
