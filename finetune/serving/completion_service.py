"""What `diptych serve` does with requests: a method for each path, from the HTTP request to the answer or its chunks.

    app = build_app(Service(settings, [Hosted("ko", served, engine)], token))       an ASGI application

The extra `serve` is imported here; serve.py says so if it is not installed.
"""

import asyncio
import hmac
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.conversations import Fault
from diptych.data_prep.rows.records import broken_character
from diptych.data_prep.text_to_ids.languages import codes_of, own_languages
from diptych.finetune.generating.documents import Document
from diptych.finetune.inference.prompts import Prompt, Prompter, prompt_of
from diptych.finetune.serving.guarded_server import ARRIVAL_SECONDS
from diptych.finetune.serving.openai_requests import (
    CompletionRequest,
    RequestError,
    check_model,
    finish_reason,
    read_request,
    read_translation,
)
from diptych.finetune.serving.request_batches import Answer, Ended, Engine, Failed, Job, Piece, show_place
from diptych.finetune.serving.serve_settings import ServeSettings
from diptych.finetune.serving.served_documents import asked_as_pieces, document_events, is_plain
from diptych.finetune.serving.served_model import Encoded, ServedModel
from diptych.finetune.serving.web_address import LARGEST_BODY, TOKEN_VARIABLE, is_asked_here

SMALL_BODY, MOST_ARRIVING = 65_536, 64_000_000
"""Bytes of one request, of one that is always read, and of all that arrive at the same time."""
ERROR_HEADERS = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}}


class Hosted(NamedTuple):
    """A model by its name for clients, and its queue."""

    name: str
    served: ServedModel
    engine: Engine


class ServerMetrics:
    """What Prometheus reads at /metrics."""

    def __init__(self, models: Sequence[Hosted]):
        self.registry = CollectorRegistry()
        kept, of_model = {"registry": self.registry}, {"registry": self.registry, "labelnames": ["model"]}
        self.requests = Counter("diptych_requests", "Requests by path and status.", ["path", "status"], **kept)
        self.dropped = Counter("diptych_dropped", "Requests whose client left, or that timed out.", **kept)
        self.read = Counter("diptych_prompt_tokens", "Tokens of prompts.", **of_model)
        self.written = Counter("diptych_generated_tokens", "Tokens generated.", **of_model)
        self.seconds = Histogram("diptych_request_seconds", "From a request to the end of its answer.", **of_model)
        sizes = [1, 2, 4, 8, 16, 32, 64, 128]
        rows = Histogram("diptych_batch_rows", "Prompts of a batch.", buckets=sizes, **of_model)
        waiting = Gauge("diptych_queue_depth", "Prompts that wait.", **of_model)
        running = Gauge("diptych_running_rows", "Prompts that are being answered.", **of_model)
        for name, _, engine in models:
            engine.on_batch = rows.labels(name).observe
            waiting.labels(name).set_function(lambda engine=engine: engine.waiting)
            running.labels(name).set_function(lambda engine=engine: engine.unanswered)

    def count(self, path: str, status: int) -> None:
        self.requests.labels(path, status).inc()
        self.dropped.inc(status in (499, 504))


class EventStream(StreamingResponse):
    """Server-sent events. Its jobs are dropped at its end, even if the client left before the first event."""

    def __init__(self, events: AsyncIterator[str], jobs: list[Job]):
        super().__init__(events, media_type="text/event-stream")
        self.jobs = jobs

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:
            drop(self.jobs)


class Service:
    """The models, and a method for each path."""

    def __init__(self, settings: ServeSettings, models: Sequence[Hosted], token: str | None = None):
        self.settings, self.token, self.is_closing = settings, token, False
        self.models = {model.name: model for model in models}
        self.device = models[0].served.loaded.device
        self.encoder, self.encoding, self.arriving = ThreadPoolExecutor(1, "encoder"), dict.fromkeys(self.models, 0), 0
        self.metrics = ServerMetrics(models)

    # The paths

    async def complete(self, request: Request) -> Response:
        return await self.answer(request, partial(read_request, is_chat=False))

    async def chat(self, request: Request) -> Response:
        return await self.answer(request, partial(read_request, is_chat=True))

    async def translate(self, request: Request) -> Response:
        return await self.answer(request, read_translation)

    async def answer(self, request: Request, read: Callable[..., CompletionRequest]) -> Response:
        """What fails drops the request's jobs."""
        self.admit(request)
        if self.is_closing:
            raise RequestError(503, "the server is about to end. Come again.", kind="overloaded")
        path, jobs = request.scope["path"], []
        try:
            body = await self.read_body(request)
            most_tokens = {name: model.served.most_tokens for name, model in self.models.items()}
            asked = read(body, most_tokens=most_tokens)
            jobs, events = await self.submit(asked)
            if asked.stream:
                return EventStream(self.stream(path, asked, jobs, events), jobs)
            answer = await while_connected(request, self.whole_answer(asked, jobs, events))
        except Exception as error:  # of any type: the jobs are dropped, and the client gets a status
            drop(jobs)
            raise self.request_error(error) from None
        self.metrics.count(path, 200)
        return JSONResponse(answer)

    async def list_models(self, request: Request) -> Response:
        """All of them in a list, or one by its name."""
        self.admit(request)
        about = {"object": "model", "created": 0, "owned_by": "diptych"}
        if (name := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": [{"id": name} | about for name in self.models]})
        check_model(name, self.models)
        return JSONResponse({"id": name} | about)

    async def health(self, request: Request) -> Response:
        self.admit(request, needs_token=False)
        state = "closing" if self.is_closing else "ok"
        first, *others = self.models
        body = {"status": state, "model": first} | ({"models": [first, *others]} if others else {})
        return JSONResponse(body, 503 if self.is_closing else 200)

    async def show_metrics(self, request: Request) -> Response:
        self.admit(request)
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    # The steps of an answer

    async def read_body(self, request: Request) -> dict[str, Any]:
        """RequestError if it comes too slowly, is too large, or is no JSON object."""
        data, too_large = bytearray(), f"the request has more than {LARGEST_BODY:,} bytes. Send less at once."
        # (A little more is read: a client that still sends when the connection is closed does not see the answer.)
        if int(request.headers.get("content-length", 0)) > 2 * LARGEST_BODY:
            raise RequestError(413, too_large)

        async def read() -> None:
            async for part in request.stream():
                self.arriving += len(part)
                data.extend(part)
                if len(data) > LARGEST_BODY:
                    raise RequestError(413, too_large)
                if len(data) > SMALL_BODY and self.arriving > MOST_ARRIVING:
                    raise RequestError(503, "too many large requests arrive at once. Come again.", kind="overloaded")

        try:
            await asyncio.wait_for(read(), ARRIVAL_SECONDS)
        except asyncio.TimeoutError:
            message = f"the request did not arrive within {ARRIVAL_SECONDS:g} seconds. Send it faster."
            raise RequestError(408, message, kind="timeout") from None
        finally:
            self.arriving -= len(data)
        return json_object(bytes(data))

    def admit(self, request: Request, needs_token: bool = True) -> None:
        """RequestError unless the request has the token or, if none is set, comes from this machine itself and not
        from a page of another site that a browser here shows."""
        if self.token is None:
            if not is_asked_here(request.headers):
                message = (
                    f"asked for as another host than this one, or by a page of one. Set {TOKEN_VARIABLE} to allow it."
                )
                raise RequestError(403, message)
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_known = hmac.compare_digest(given.strip().encode("latin-1"), os.fsencode(self.token))
        if needs_token and not (scheme.lower() == "bearer" and is_known):
            message = f"a token is needed: Authorization: Bearer …, as in {TOKEN_VARIABLE} of the server."
            raise RequestError(401, message, kind="authentication_error")

    async def submit(self, asked: CompletionRequest) -> tuple[list[Job], asyncio.Queue]:
        """Queues the prompts. Returns their jobs, and a queue of (index of the job, event)."""
        loop, events, most = asyncio.get_running_loop(), asyncio.Queue(), self.settings.queue
        name, _, engine = self.models[asked.model]
        if len(asked.rows) > most:
            message = f"the request has {len(asked.rows)} prompts, but only {most} can wait. Send fewer at once."
            raise RequestError(400, message, "prompt")
        if engine.waiting + self.encoding[name] + len(asked.rows) > most:
            raise RequestError(503, f"up to {most} prompts wait already. Come again.", kind="overloaded")
        self.encoding[name] += len(asked.rows)
        try:  # in a thread, because four megabytes take seconds
            asked.documents, sources = await loop.run_in_executor(self.encoder, self.encode, asked)
        finally:
            self.encoding[name] -= len(asked.rows)

        def to_queue(place: int):
            return lambda event: loop.call_soon_threadsafe(events.put_nowait, (place, event))

        if len(sources) > most:
            message = f"the request is cut into {len(sources)} pieces, but only {most} can wait. Send less at once."
            raise RequestError(400, message, asked.field_of(""))
        jobs = [
            Job(source.source_ids, asked.decoding, to_queue(place), asked.stream, given=source.given)
            for place, source in enumerate(sources)
        ]
        engine.submit(jobs)
        asked.prompt_tokens = sum(len(source.source_ids) for source in sources)
        self.metrics.read.labels(name).inc(asked.prompt_tokens)
        return jobs, events

    def encode(self, asked: CompletionRequest) -> tuple[list[Document], list[Encoded]]:
        """The prompts, and the token ids of all their pieces, by the template as `diptych generate` does it.
        RequestError if one is too long."""
        served, documents, sources = self.models[asked.model].served, [], []
        asked.default_source = served.prompter.languages.source or own_languages(served.prompter.tokenizer).source
        try:
            for row in asked.rows:
                document, of_document = asked_as_pieces(served, as_asked(served.prompter, prompt_of(row)))
                for source in of_document:
                    if source.tokens > (most := len(source.source_ids)):
                        message = f"the prompt has {source.tokens} tokens, and {most} are read. Send a shorter one."
                        raise UserError(message)
                    served.check(source.tokens, asked.decoding, len(source.given))
                if (asked.decoding.scores or asked.decoding.grammar) and not is_plain(document):
                    its = "a response format" if asked.decoding.grammar else "'logprobs' or 'confidence'"
                    raise UserError(f"{its} is for whole prompts: this one is cut, or has terms or placeholders.")
                documents.append(document)
                sources += of_document
        except (UserError, Fault) as error:
            field = error.field if isinstance(error, Fault) else asked.field_of(str(error))
            raise RequestError(400, str(error), field) from None
        return documents, sources

    async def events_of(self, jobs: list[Job], events: asyncio.Queue) -> AsyncIterator[tuple[int, Piece | Ended]]:
        """(index of the job, event) until all have ended. Raises TimeoutError, or the error of a batch that failed."""
        until, open_jobs = jobs[0].created + self.settings.timeout, len(jobs)
        while open_jobs:
            place, event = await asyncio.wait_for(events.get(), until - time.monotonic())
            if isinstance(event, Failed):
                raise server_error(event.error)
            open_jobs -= isinstance(event, Ended)
            yield place, event

    async def whole_answer(self, asked: CompletionRequest, jobs: list[Job], events: asyncio.Queue) -> dict[str, Any]:
        found = document_events(asked.documents, self.events_of(jobs, events), streams=False)
        ended = {place: event.answers async for place, event in found}
        answers = [answer for place in range(len(asked.documents)) for answer in ended[place]]
        self.count_answers(asked.model, jobs, answers)
        return asked.body(answers)

    async def chunks(
        self, asked: CompletionRequest, jobs: list[Job], events: asyncio.Queue
    ) -> AsyncIterator[dict[str, Any]]:
        """OpenAI's chunks: one for each piece, one that ends each answer, and the usage if it was asked for."""
        answers = []
        async for place, event in document_events(asked.documents, self.events_of(jobs, events), streams=True):
            first = place * asked.decoding.n
            if isinstance(event, Piece):
                yield asked.chunk(first + event.index, event.text)
                continue
            answers += event.answers
            for index, answer in enumerate(event.answers):
                yield asked.chunk(first + index, "", finish_reason(answer), answer.facts)
        self.count_answers(asked.model, jobs, answers)
        if asked.include_usage:
            yield asked.usage_chunk(answers)

    async def stream(
        self, path: str, asked: CompletionRequest, jobs: list[Job], events: asyncio.Queue
    ) -> AsyncIterator[str]:
        """The chunks as server-sent events. When the client leaves, starlette closes this generator."""
        status = 499
        try:
            async for chunk in self.chunks(asked, jobs, events):
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            status = 200
            yield "data: [DONE]\n\n"
        except Exception as error:  # of any type: the stream has begun, so the error is its last event
            refused = self.request_error(error)
            status = refused.status
            yield f"data: {json.dumps(refused.body())}\n\n"
        finally:
            self.metrics.count(path, status)

    def count_answers(self, model: str, jobs: list[Job], answers: Sequence[Answer]) -> None:
        self.metrics.written.labels(model).inc(sum(len(answer.ids) for answer in answers))
        self.metrics.seconds.labels(model).observe(time.monotonic() - jobs[0].created)

    def request_error(self, error: Exception) -> RequestError:
        if isinstance(error, RequestError):
            return error
        if isinstance(error, ClientDisconnect):
            return RequestError(499, "the client has gone.")
        if isinstance(error, asyncio.TimeoutError):
            seconds = self.settings.timeout
            return RequestError(504, f"no answer within {seconds:g} seconds. Ask for fewer tokens.", kind="timeout")
        show_place(error)
        return server_error(error)

    def close(self) -> None:
        """Requests under way are answered, new ones refused."""
        self.is_closing = True


def as_asked(prompter: Prompter, prompt: Prompt) -> Prompt:
    """For a T5 with languages, `translate English to Korean:` is the instruction, and the prompt is its input."""
    has_words = codes_of(prompter.tokenizer).layout == "words"
    direction = prompt.languages.filled_from(prompter.languages).direction
    if has_words and any(prompt.languages) and not direction:
        raise UserError("one language alone is not used by this model. Give source and target, or neither.")
    if prompt.input or not has_words or not direction:
        return prompt
    return prompt._replace(instruction="", input=prompt.instruction)


def json_object(data: bytes) -> dict[str, Any]:
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


async def while_connected(request: Request, answer: Coroutine) -> dict[str, Any]:
    """The awaited answer; raises ClientDisconnect as soon as the client closes the connection."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(disconnected())
    await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if answering.done():
        return answering.result()
    answering.cancel()
    raise ClientDisconnect


def drop(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.is_dropped = True


def server_error(error: Exception) -> RequestError:
    """For an error of the server's own: the request has passed all checks."""
    message = str(error) if isinstance(error, UserError) else f"the server failed: {type(error).__name__}"
    return RequestError(500, message, kind="server_error")


def build_app(service: Service) -> Starlette:
    """The ASGI application."""

    routes = [
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/translations", service.translate, methods=["POST"]),
        Route("/v1/models", service.list_models),
        Route("/v1/models/{name:path}", service.list_models),
        Route("/health", service.health),
        Route("/metrics", service.show_metrics),
    ]
    paths = {route.path for route in routes}

    async def refuse(request: Request, error: RequestError) -> Response:
        path = request.scope["path"]
        service.metrics.count(path if path in paths else "elsewhere", error.status)
        return JSONResponse(error.body(), error.status, ERROR_HEADERS.get(error.status))

    async def list_paths(request: Request, error: Exception) -> Response:
        there = ", ".join(f"{'POST' if 'POST' in route.methods else 'GET'} {route.path}" for route in routes)
        return await refuse(request, RequestError(error.status_code, f"there are {there}.", kind="not_found"))

    return Starlette(routes=routes, exception_handlers={404: list_paths, 405: list_paths, RequestError: refuse})
