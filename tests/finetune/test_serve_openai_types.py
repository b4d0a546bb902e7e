"""`diptych serve` against the request types of the installed `openai` package: each of their fields, with values of
each type that it may have, is answered or refused by its name, and OpenAI's models parse the answers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import openai
import pytest
from conftest import tiny_t5
from listening import listening
from openai.types import Completion, completion_create_params
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat import completion_create_params as chat_create_params
from typing_extensions import NotRequired, Required, is_typeddict

MOST_TOKENS = 8
MESSAGES = [{"role": "user", "content": "Go."}]
BASES = {
    "chat/completions": (chat_create_params, {"messages": MESSAGES}, ChatCompletion, ChatCompletionChunk),
    "completions": (completion_create_params, {"prompt": "Go."}, Completion, Completion),
}
PLAIN = {"seed", "stream", "temperature", "top_p", "user"}
IGNORED = {"metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options", "store"}
IGNORED |= {"prompt_cache_retention", "safety_identifier", "service_tier"}
NEVER_REFUSED = {"chat/completions": PLAIN | IGNORED, "completions": PLAIN}
ASK_FOR_NOTHING = {
    "completions": {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "echo": False, "best_of": 1}
    | {"n": 1, "suffix": "", "temperature": 1.0, "top_p": 0, "seed": -1, "stream_options": {"include_usage": True}},
    "chat/completions": {"tool_choice": "none", "function_call": "auto", "tools": [], "functions": [], "n": 1}
    | {"parallel_tool_calls": True, "modalities": ["text"], "logprobs": False, "top_logprobs": 0, "store": True}
    | {"temperature": 1e-39, "metadata": {"a": "b"}, "service_tier": "auto", "reasoning_effort": "none", "seed": -1}
    | {"verbosity": "medium", "response_format": {"type": "text"}, "stream_options": {"include_obfuscation": False}},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_tokenizer):
    """A model that never ends by itself."""
    folder = tmp_path_factory.mktemp("served") / "t5"
    model = tiny_t5(len(tiny_tokenizer))
    model.generation_config.suppress_tokens = [0, 1, 2]
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    log = folder / "log"
    limits = ("--max_new_tokens", str(MOST_TOKENS), "--batch_wait_ms", "0", "--template", "chat")
    with listening(["serve", str(folder), *limits], log) as started:
        started.client = openai.OpenAI(base_url=f"{started.url}/v1", api_key="any", max_retries=0)
        yield started
        assert "Traceback" not in log.read_text()


def samples(kind: Any) -> list[Any]:
    """Values of a type: of a union those of all its types, of an object the least one, and with each of its keys."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Required, NotRequired, Annotated):
        return samples(inside[0])
    if origin in (Union, UnionType):
        return [value for one in inside for value in samples(one)]
    if origin is Literal:
        return list(inside)
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        least = {name: samples(hint)[0] for name, hint in hints.items() if get_origin(hint) is Required}
        return [least, *(least | {name: value} for name in hints for value in samples(hints[name]))]
    if origin in (list, Sequence, Iterable):
        return [[], *([value] for value in samples(inside[0]))]
    if origin in (dict, Mapping):
        return [{}, {"a": samples(inside[1])[0]}]
    return {
        **{NoneType: [None], bool: [False, True], int: [1, 0, -1], float: [0.5, 0.0], str: ["Go.", ""]},
        **{object: ["Go."]},
    }[kind]


def ask(served, path: str, body: dict[str, Any], **more: Any) -> Any:
    """What the client makes of the answer; OpenAI's error object where it is refused."""
    create = served.client.chat.completions.create if "chat" in path else served.client.completions.create
    try:
        answer = create(**({"model": "t5"} | BASES[path][1] | body | more))
        return list(answer) if isinstance(answer, openai.Stream) else answer
    except (openai.BadRequestError, openai.NotFoundError) as error:
        return error.body


def parsed(path: str, found: Any) -> Any:
    """As OpenAI's models have it, each of their fields checked, which the client itself does not do."""
    _, _, whole, chunk = BASES[path]
    if not isinstance(found, list):
        return whole.model_validate(found.to_dict())
    pieces = [one.to_dict() for one in found]
    for choice in (choice for piece in pieces for choice in piece["choices"] if "chat" not in path):
        choice["finish_reason"] = choice["finish_reason"] or "stop"  # null in a stream, which this type leaves out
    return [chunk.model_validate(piece) for piece in pieces]


@pytest.mark.slow
@pytest.mark.parametrize("path", BASES)
def test_each_field_of_the_types_is_answered_or_refused_by_name(served, path):
    hints = get_type_hints(BASES[path][0].CompletionCreateParamsStreaming, include_extras=True)
    refused = {}
    for name, hint in hints.items():
        values = samples(hint)
        for value in [None, *(value for at, value in enumerate(values) if value not in values[:at])]:
            found = ask(served, path, {name: value})
            if isinstance(found, dict):
                assert found["param"].startswith(name) and name in found["message"], (name, value, found)
                refused.setdefault(name, []).append(value)
            else:
                assert parsed(path, found), (name, value)
    assert not refused.keys() & NEVER_REFUSED[path], refused
    assert {name for name in refused if None in refused[name]} == hints.keys() & {"messages", "prompt"}


@pytest.mark.parametrize("path", BASES)
def test_what_asks_for_nothing_changes_nothing(served, path):
    alone = ask(served, path, {}).choices[0]
    nulls = dict.fromkeys({"prediction", "audio", "no_field_that_is_known", *ASK_FOR_NOTHING[path]})
    for body in (ASK_FOR_NOTHING[path], nulls):
        assert parsed(path, ask(served, path, {}, extra_body=body)).choices == [alone]
        streamed = ask(served, path, {"stream": True}, extra_body=body)
        choices = [choice for chunk in streamed for choice in chunk.choices]
        assert parsed(path, streamed) and choices[-1].finish_reason == alone.finish_reason
        text = "".join(choice.delta.content if "chat" in path else choice.text for choice in choices)
        assert text == (alone.message.content if "chat" in path else alone.text)


def test_a_limit_above_the_server_s_is_cut_and_said(served):
    for path in BASES:
        names = ("max_tokens", "max_completion_tokens")[: 1 + ("chat" in path)]
        for body in ({}, *({name: 10**9} for name in names)):
            found = ask(served, path, body)
            assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (MOST_TOKENS, "length")
    both = ask(served, "chat/completions", {"max_tokens": 5, "max_completion_tokens": 3})
    assert both.usage.completion_tokens == 3


def test_turns_that_nobody_could_learn_from_are_answered(served):
    """Empty turns before the question, marks of training, and what a client sends back of an answer."""
    message = ask(served, "chat/completions", {}).choices[0].message.to_dict()
    nothing = {"tool_calls": [], "function_call": None, "refusal": None, "annotations": [], "audio": None}
    question = {"role": "user", "content": "And?"}
    for turn in ({"content": ""}, {"content": None}, {"content": "Gone."} | nothing, {"content": "x", "weight": 0.5}):
        for history in ([*MESSAGES, {"role": "assistant"} | turn], [{"role": "user", "content": ""}, message]):
            found = ask(served, "chat/completions", {"messages": [*history, question]})
            assert not isinstance(found, dict), found


@pytest.mark.parametrize(
    "messages, param, says",
    [
        ([{"role": "user", "content": " \u200b"}], "messages", "is empty, so nothing is asked"),
        ([{"role": "system", "content": "Be kind."}], "messages", "nothing is asked"),
        ([*MESSAGES, {"role": "assistant", "content": "Gone."}], "messages[1]", "End with a user turn"),
        ([*MESSAGES, {"role": "assistant", "tool_calls": [{}]}, *MESSAGES], "messages[1].role", "calls a tool"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]", "type 'text'"),
        ([{"role": "king", "content": "Go."}], "messages[0].role", "known are"),
        ([{"role": "tool", "content": "Go."}], "messages[0].role", "tool"),
    ],
)
def test_turns_that_ask_for_what_is_not_done_are_named(served, messages, param, says):
    error = ask(served, "chat/completions", {"messages": messages})
    assert error["param"] == param and says in error["message"] and "learned" not in error["message"]


def test_a_client_s_words_are_cut_in_messages(served):
    long = "x" * 100_000
    for body in ({long: 1}, {"model": long}, {"prompt": {long: long}}, {"temperature": long}, {"stop": {long: 1}}):
        with pytest.raises(openai.APIStatusError) as error:
            served.client.completions.create(**({"model": "t5", "prompt": "Go."}), extra_body=body)
        assert len(json.dumps(error.value.body)) < 1000
