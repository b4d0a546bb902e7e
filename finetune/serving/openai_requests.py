"""Requests of OpenAI's completions and chat completions, checked by hand; answers as OpenAI's client parses them. And
translations, in the form of vLLM's open proposal (pull request 58111, "Add text /v1/translations endpoint").

    asked = read_request({"prompt": "Name the capital.", "input": "France", "n": 2, "temperature": 1}, …)
    asked.rows         [{"instruction": "Name the capital.", "input": "France", "system": ""}]
    asked.decoding     Decoding(max_new_tokens=256, temperature=1.0, n=2)
    asked.body(…)      {"id": "cmpl-…", "object": "text_completion", "choices": […], "usage": {…}}

A null field counts as absent. A field that asks for what the server cannot do (tools, images) is refused by its name.
The checks are written out, without pydantic: the `serve` extra would need it for these alone, and what a field with a
harmless value, a null or a nested path gets is ours to say either way.
"""

import itertools
import json
import re
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diptych.data_prep.command_line.errors import UserError, excerpt, nearest
from diptych.data_prep.rows.conversations import MARKS, MARKS_NOT_READ
from diptych.data_prep.rows.language_names import SOURCE_COLUMNS, TARGET_COLUMNS
from diptych.finetune.generating.documents import Document
from diptych.finetune.inference.constraints import Grammar, grammar_of
from diptych.finetune.serving.request_batches import Answer, Decoding

MOST_PROMPTS = 64
MOST_ANSWERS = 16
"""To a prompt, and beams."""
LANGUAGES = (*SOURCE_COLUMNS[:2], *TARGET_COLUMNS[:2])
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
"""One setting by its old and its new name."""
KNOWN = {
    *("model", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", *LANGUAGES, *TOKEN_LIMITS),
    *("num_beams", "use_beam_search", "length_penalty", "repetition_penalty", "response_format", "structured_outputs"),
    "confidence",
}
"""`num_beams` is transformers' name. vLLM has `use_beam_search`, with `n` or `best_of` as the number of beams."""
TRANSLATION = {
    *("model", "text", "source_language", "target_language", "stream", "max_tokens", "temperature", "top_p", "seed"),
    *("num_beams", "length_penalty"),
}
"""Fields of a translation. `num_beams` and `length_penalty` are not in the proposal."""
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
    "stream_options.include_obfuscation": (False,),
}
"""Values of further fields that ask for nothing, and are accepted."""
LOGPROBS = {
    True: "In a chat, 'logprobs' is true or false. true gives the log-probability of each token of the answer.",
    False: "In a completion, 'logprobs' can be 0 only: the log-probability of each token of the answer.",
}
"""By `is_chat`: what is said of another value."""
LEAST_TEMPERATURE = 1e-5
"""Below it the likeliest token is taken: logits that are divided by less can overflow float32."""
LARGEST_INTEGER = 2**63 - 1
LONGEST_MESSAGE = 600
"""Characters of an error, which may quote a client."""


class RequestError(Exception):
    """What a client did wrong, or the server cannot do now: an HTTP status, OpenAI's kind of error, and the field."""

    def __init__(self, status: int, message: str, param: str | None = None, kind: str = "invalid_request_error"):
        super().__init__(excerpt(message, LONGEST_MESSAGE))
        self.status, self.param, self.kind = status, param and excerpt(param, 60), kind

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": None}}


@dataclass
class CompletionRequest:
    """A checked request, and its answer's parts."""

    is_chat: bool
    model: str
    rows: list[dict[str, Any]]
    """Its prompts as rows of `diptych generate --in_file`."""
    decoding: Decoding
    stream: bool
    include_usage: bool
    prompt_tokens: int = 0
    documents: list[Document] = field(default_factory=list)
    """Its prompts as they are asked, once they are encoded."""
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    has_role: set[int] = field(default_factory=set)
    """The answers of which a chunk with the role was sent."""
    has_logprobs: bool = False
    default_source: str = ""
    """The language of a source that names none, once the prompts are encoded."""

    def field_of(self, error: str) -> str:
        """The field that an error about its prompts names."""
        return "messages" if self.is_chat else "prompt"

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"

    def body(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [
            self._choice(index, answer.text, finish_reason(answer), "message") | self._scores(answer) | answer.facts
            for index, answer in enumerate(answers)
        ]
        return self._envelope("") | {"choices": choices, "usage": self.usage(answers)}

    def chunk(
        self, index: int, text: str, reason: str | None = None, facts: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        return self._envelope(".chunk") | {"choices": [self._choice(index, text, reason, "delta") | (facts or {})]}

    def usage_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return self._envelope(".chunk") | {"choices": [], "usage": self.usage(answers)}

    def usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        read, written = self.prompt_tokens, sum(len(answer.ids) for answer in answers)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _scores(self, answer: Answer) -> dict[str, Any]:
        if not self.has_logprobs:
            return {}
        if self.is_chat:
            parts = [
                {"token": text, "logprob": score, "bytes": list(text.encode()), "top_logprobs": []}
                for text, score in answer.scored
            ]
            return {"logprobs": {"content": parts}}
        texts, scores = [text for text, _ in answer.scored], [score for _, score in answer.scored]
        offsets = list(itertools.accumulate(map(len, texts[:-1]), initial=0))
        found = {"tokens": texts, "token_logprobs": scores, "text_offset": offsets, "top_logprobs": None}
        return {"logprobs": found}

    def _envelope(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, index: int, text: str, reason: str | None, key: str) -> dict[str, Any]:
        if not self.is_chat:
            return {"index": index, "text": text, "finish_reason": reason, "logprobs": None}
        role = {} if index in self.has_role else {"role": "assistant"}
        self.has_role.add(index)
        return {"index": index, key: role | {"content": text}, "finish_reason": reason}


class TranslationRequest(CompletionRequest):
    """A checked request for one translation."""

    def __post_init__(self) -> None:
        self.id = f"transl-{uuid.uuid4().hex}"

    def field_of(self, error: str) -> str:
        languages = ("source_language", "target_language")
        return next((name for name in languages if f"'{self.rows[0].get(name)}'" in error), "text")

    def body(self, answers: Sequence[Answer]) -> dict[str, Any]:
        (row,), (answer,) = self.rows, answers
        languages = {"source_language": row.get("source_language") or self.default_source or None}
        languages["target_language"] = row["target_language"]
        text = {"translated_text": answer.text, "finish_reason": finish_reason(answer)} | answer.facts
        return self._envelope("") | text | languages | {"usage": self.usage(answers)}

    def _envelope(self, suffix: str) -> dict[str, Any]:
        return super()._envelope(suffix) | {"object": f"translation{suffix}"}

    def _choice(self, index: int, text: str, reason: str | None, key: str) -> dict[str, Any]:
        return {"index": index, key: {"translated_text": text}, "finish_reason": reason}


def finish_reason(answer: Answer) -> str:
    return "stop" if answer.finished else "length"


def read_request(body: dict[str, Any], is_chat: bool, most_tokens: Mapping[str, int]) -> CompletionRequest:
    """RequestError for the first field that is wrong or asks for what is not done here. `most_tokens` are the caps on
    new tokens of the models by their names."""
    body = _without_nulls(body)
    # A chat asks for each token's log-probability by true; a completion by 0, the number of alternatives beside it.
    logprobs = body.get("logprobs", False)
    has_scores = logprobs is True if is_chat else type(logprobs) is int
    if logprobs not in HARMLESS["logprobs"] and not (is_chat and has_scores):
        message = f"{LOGPROBS[is_chat]} Those of other tokens (top_logprobs) are not supported."
        raise RequestError(400, message, "logprobs")
    own = {"messages"} if is_chat else {"prompt", "input", "system"}
    own |= ({"logprobs"} if is_chat and has_scores else set()) | (
        {"best_of"} if body.get("use_beam_search") else set()
    )
    _check_fields(body, KNOWN | own)
    model = asked_model(body, most_tokens)
    stream = _field(body, "stream", bool, False)
    options = _without_nulls(_field(body, "stream_options", dict, {}))
    _check_fields(options, {"include_usage"}, "stream_options.")
    include_usage = _field(options, "include_usage", bool, False)
    wants_facts = _field(body, "confidence", bool, False)
    if wants_facts and stream:
        raise RequestError(
            400, "'confidence' is known when all is written. Ask for it without 'stream'.", "confidence"
        )
    if has_scores and stream:
        raise RequestError(400, "'logprobs' are known when all is written. Ask for them without 'stream'.", "logprobs")
    decoding = _decoding(body, most_tokens[model])._replace(
        scores=has_scores or wants_facts, confidence=wants_facts, grammar=_grammar(body)
    )
    rows = _chat_rows(body) if is_chat else _completion_rows(body)
    languages = {name: _field(body, name, str, "") for name in LANGUAGES if body.get(name) is not None}
    rows = [row | languages for row in rows]
    return CompletionRequest(is_chat, model, rows, decoding, stream, include_usage, has_logprobs=has_scores)


def read_translation(body: dict[str, Any], most_tokens: Mapping[str, int]) -> TranslationRequest:
    """As `read_request`."""
    body = _without_nulls(body)
    if "prompt_template" in body:
        message = "'prompt_template' cannot be given here: the checkpoint has its own template. Leave it out."
        raise RequestError(400, message, "prompt_template")
    _check_fields(body, TRANSLATION)
    model = asked_model(body, most_tokens)
    text, target = _field(body, "text", str, ""), _field(body, "target_language", str, "")
    for name, value in {"text": text, "target_language": target}.items():
        if not value.strip():
            raise RequestError(400, f"{name!r} is missing or empty.", name)
    languages = {"target_language": target}
    if source := _field(body, "source_language", str, ""):
        languages["source_language"] = source
    decoding, stream = _decoding(body, most_tokens[model]), _field(body, "stream", bool, False)
    return TranslationRequest(False, model, [{"input": text} | languages], decoding, stream, include_usage=False)


def asked_model(body: dict[str, Any], names: Collection[str]) -> str:
    """The name of the model that is asked; with one model, it need not be named."""
    first, *others = names
    if body.get("model") is None and others:
        raise RequestError(400, f"'model' is missing. Name one of {', '.join(map(repr, names))}.", "model")
    name = _field(body, "model", str, first)
    check_model(name, names)
    return name


def check_model(name: str, names: Collection[str]) -> None:
    if name not in names:
        there = "this is" if len(names) == 1 else "there are"
        message = f"there is no model '{excerpt(name, 60)}' here; {there} {', '.join(map(repr, names))}."
        raise RequestError(404, message, "model")


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _check_fields(fields: dict[str, Any], known: set[str], path: str = "") -> None:
    for name, value in fields.items():
        harmless = HARMLESS.get(f"{path}{name}", ())
        is_harmless = any(value == it and isinstance(value, bool) == isinstance(it, bool) for it in harmless)
        if name not in known | IGNORED and not is_harmless:
            alternative = f", or give {' or '.join(map(json.dumps, harmless))}" if harmless else ""
            near = nearest(name, known)
            alternative += f". Did you mean '{path}{near}'?" if near else "."
            message = f"'{path}{excerpt(name, 60)}' asks for something not done here. Leave it out{alternative}"
            raise RequestError(400, message, f"{path}{name}")


def _field(body: dict[str, Any], name: str, kind: type | tuple[type, ...], default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(one.__name__ for one in kinds)
        raise RequestError(400, f"{name!r} is {excerpt(json.dumps(value), 60)}; it must be of type {expected}.", name)
    return value


def _number(body: dict[str, Any], name: str, kind: type | tuple[type, ...], default: Any, low: Any, high: Any) -> Any:
    value = _field(body, name, kind, default)
    if value is not None and not low <= value <= high:
        allowed = f"{low} or more" if (low, high) == (1, LARGEST_INTEGER) else f"a number from {low} to {high}"
        raise RequestError(400, f"{name!r} is {value}; it is {allowed}.", name)
    return value


def _decoding(body: dict[str, Any], most_tokens: int) -> Decoding:
    limits = [_number(body, name, int, most_tokens, 1, LARGEST_INTEGER) for name in TOKEN_LIMITS]
    temperature = float(_number(body, "temperature", (int, float), 0, 0, 2))
    temperature = temperature if temperature >= LEAST_TEMPERATURE else 0.0
    top_p = float(_number(body, "top_p", (int, float), 1, 0, 1))
    count = _number(body, "n", int, 1, 1, MOST_ANSWERS)
    beams = _beams(body, count)
    if beams > 1 and temperature:
        raise RequestError(400, "beams and a temperature exclude each other. Leave one out.", "temperature")
    if count > beams and not temperature:
        message = f"'n' is {count}, but {beams} beams have no more. Give as many 'num_beams', or a temperature."
        if beams == 1:
            message = "'n' above 1 needs a temperature, or as many 'num_beams': otherwise all answers are the same."
        raise RequestError(400, message, "n")
    penalties = {
        "length_penalty": float(_number(body, "length_penalty", (int, float), 1, -10, 10)),
        "repetition_penalty": float(_number(body, "repetition_penalty", (int, float), 1, 0.01, 10)),
    }
    if penalties["length_penalty"] != 1 and beams == 1:
        raise RequestError(400, "'length_penalty' is for beams. Leave it out, or give 'num_beams'.", "length_penalty")
    stop = _field(body, "stop", (str, list), [])
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > 16 or not all(isinstance(text, str) and text for text in stop):
        raise RequestError(400, "'stop' is a text that is not empty, or a list of up to 16 of them.", "stop")
    seed = _number(body, "seed", int, None, -LARGEST_INTEGER - 1, LARGEST_INTEGER)
    if not temperature:  # then both change nothing, and prompts can share a batch
        top_p, seed = 1.0, None
    return Decoding(min(most_tokens, *limits), temperature, top_p, count, tuple(stop), seed, beams, **penalties)


def _grammar(body: dict[str, Any]) -> Grammar | None:
    """What the answer has to be: `response_format` as OpenAI's clients send it, `structured_outputs` as vLLM's do."""
    form = _without_nulls(_field(body, "response_format", dict, {"type": "text"}))
    asked = _without_nulls(_field(body, "structured_outputs", dict, {}))
    field, found = "structured_outputs", {name: asked[name] for name in asked if asked[name] is not False}
    schema_of_form = _field(form, "json_schema", dict, {}).get("schema")
    if form.get("type") == "json_object":
        field, found = "response_format", found | {"json_object": True}
    elif form.get("type") == "json_schema" and schema_of_form is not None:
        field, found = "response_format", found | {"json": schema_of_form}
    elif form != {"type": "text"}:
        message = "'response_format' has a type: text, json_object, or json_schema with {name, schema} beside it."
        raise RequestError(400, message, "response_format")
    if len(found) > 1 or not found.keys() <= {"json", "json_object", "regex", "choice"}:
        message = f"{field!r} is one of json (a schema), json_object, regex and choice. Others are not done here."
        raise RequestError(400, message, field)
    if not found:
        return None
    [(kind, value)] = found.items()
    if kind == "choice" and isinstance(value, list) and value and all(it and isinstance(it, str) for it in value):
        kind, value = "regex", "|".join(map(re.escape, value))
    try:
        if kind == "regex" and isinstance(value, str):
            return grammar_of(regex=value)
        schema = {"type": "object"} if kind == "json_object" else value
        schema = json.loads(schema) if isinstance(schema, str) else schema
        if kind in ("json", "json_object") and isinstance(schema, dict | bool):
            return grammar_of(json_schema=schema)
    except (UserError, ValueError, RecursionError) as error:
        raise RequestError(400, f"{field!r}: {error}", field) from None
    raise RequestError(400, f"{field!r}: {kind} has a value of another kind than expected.", field)


def _beams(body: dict[str, Any], count: int) -> int:
    """The width of beam search; 1 is none."""
    width = _number(body, "num_beams", int, 1, 1, MOST_ANSWERS)
    if not _field(body, "use_beam_search", bool, False):
        return width
    best_of = _number(body, "best_of", int, 1, 1, MOST_ANSWERS)
    if (found := max(width, best_of, count)) == 1:
        message = f"'use_beam_search' needs a number of beams, 2 to {MOST_ANSWERS}: 'num_beams', 'best_of' or 'n'."
        raise RequestError(400, message, "use_beam_search")
    return found


def _chat_rows(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages = _field(body, "messages", list, None)
    if not messages:
        raise RequestError(400, "'messages' is missing or empty. Give a list of {role, content}.", "messages")
    turns = [_turn(message) for message in messages]
    if isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        where = f"messages[{len(turns) - 1}]"
        message = f"'{where}' is an assistant turn, and answers are not continued. End with a user turn."
        raise RequestError(400, message, where)
    return [{"messages": turns}]


def _turn(message: Any) -> Any:
    """The message without null fields and marks of training. An assistant's content may be missing."""
    if not isinstance(message, dict):
        return message
    turn = {name: message[name] for name in _without_nulls(message).keys() - MARKS.keys() - MARKS_NOT_READ.keys()}
    return {"content": turn.get("refusal", "")} | turn if turn.get("role") == "assistant" else turn


def _completion_rows(body: dict[str, Any]) -> list[dict[str, Any]]:
    prompts = _field(body, "prompt", (str, list), None)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    others = {name: _field(body, name, str, "") for name in ("input", "system")}
    are_texts = prompts and all(isinstance(it, str) and (it.strip() or others["input"]) for it in prompts)
    if not are_texts or len(prompts) > MOST_PROMPTS:
        message = f"'prompt' is a text that is not empty, or a list of 1 to {MOST_PROMPTS} of them (no token ids)."
        raise RequestError(400, message, "prompt")
    return [{"instruction": prompt} | others for prompt in prompts]
