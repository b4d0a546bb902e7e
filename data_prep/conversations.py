"""From a conversation to examples: each answer is one, with the question before it and all that was said earlier.

    system     Be brief.            system        "Be brief."
    user       Hi.                  example 1     "Hi." → "Hello."
    assistant  Hello.
    user       Who are you?         example 2     "Who are you?" → "A model.", after (("Hi.", "Hello."),)
    assistant  A model.

Consecutive user turns and several system turns are joined by a newline; text parts of one message by nothing, as chat
templates do. What has no place in an example is refused rather than lost: turns and calls of tools, parts that are no
text, a system turn after the first user turn, an answer without a question. Of other keys of a turn only `weight` is
read: an assistant turn with weight 0 is history and not an example, as OpenAI has it.

At inference the same conversation asks one thing (`open_question`): what its last user turn says, after all before it.

An answer costs 5 µs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diptych.data_prep.validate import Fault, described, missing_inside, text, without_index

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
}
TOOL_ROLES = {"tool", "function", "function_call", "tool_call", "observation", "tool_response", "ipython"}

MAX_TURNS = 1000
"""Answers in one conversation. Each becomes an example with all before it, so their size grows with the square."""


class Turn(NamedTuple):
    """One message of a conversation. `where` is its text, as in `messages[2].content`."""

    role: str
    text: str
    where: str
    is_target: bool


def turns_of(value: Any, name: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> list[Turn]:
    """`name` is the column; `roles` says which role of ours each role of the data is."""
    if not isinstance(value, list | tuple):
        reason = f"'{name}' is {described(value)}, and a list of turns is due."
        raise Fault(name, f"'{name}' is not a list", reason, of_shape=True)
    return [_turn(turn, f"{name}[{n}]", role_key, text_key, roles) for n, turn in enumerate(value)]


def _turn(turn: Any, where: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> Turn:
    if not isinstance(turn, Mapping):
        reason = f"'{where}' is {described(turn)}, and a turn with '{role_key}' and '{text_key}' is due."
        raise Fault(where, f"'{without_index(where)}' is not a turn", reason)
    written = turn.get(role_key)
    role = roles.get(written) if isinstance(written, str) else None
    if turn.get("tool_calls") or turn.get("function_call") or (role is None and _is_tool(written)):
        reason = f"'{where}' calls a tool or is a tool's answer, and only text can be learned from."
        raise Fault(f"{where}.{role_key}", "tool turn", f"{reason} Write it as text, or leave the conversation out.")
    if role_key not in turn or text_key not in turn:
        raise missing_inside(text_key if role_key in turn else role_key, turn, where, (role_key, text_key))
    if role is None:
        reason = f"'{where}.{role_key}' is {described(written)}; known are {', '.join(roles)}."
        raise Fault(f"{where}.{role_key}", "unknown role", reason)
    place = f"{where}.{text_key}"
    content = text(_content(turn[text_key], place), place, may_be_empty=role == "system", what=f"{role} turn")
    return Turn(role, content, place, is_target=role == "assistant" and turn.get("weight") != 0)


def _is_tool(role: Any) -> bool:
    return isinstance(role, str) and role in TOOL_ROLES


def _content(value: Any, where: str) -> Any:
    """The text of a message that is written in parts: `[{"type": "text", "text": "Hi."}]`."""
    if not isinstance(value, list | tuple):
        return value
    texts = []
    for number, part in enumerate(value):
        place = f"{where}[{number}]"
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            what = described(part.get("type") if isinstance(part, Mapping) else part)
            reason = f"'{place}' is of type {what}; only parts of type 'text' can be learned from."
            raise Fault(place, "part that is no text", reason)
        if "text" not in part:
            raise missing_inside("text", part, place, ("type",))
        texts.append(text(part["text"], f"{place}.text", may_be_empty=True))
    return "".join(texts)


class ChatExample(NamedTuple):
    """One answer. `history` holds earlier (instruction, output) turns, oldest first."""

    instruction: str
    history: tuple[tuple[str, str], ...]
    output: str


def answers(turns: Sequence[Turn], name: str) -> tuple[list[str], list[ChatExample], Turn | None]:
    """What system turns say, the examples, and the user turn at the end that nobody answers."""
    if sum(turn.role == "assistant" for turn in turns) > MAX_TURNS:
        raise Fault(name, "too many turns", f"'{name}' has more than {MAX_TURNS:,} assistant turns. Divide it.")
    system, exchanges, asked = _exchanges(turns)
    history = [(exchange.instruction, exchange.answer.text) for exchange in exchanges]
    examples = [
        ChatExample(exchange.instruction, tuple(history[:place]), exchange.answer.text)
        for place, exchange in enumerate(exchanges)
        if exchange.answer.is_target
    ]
    if not examples:
        raise Fault(name, "no assistant turn", f"'{name}' has no assistant turn to learn from.")
    return system, examples, asked[0] if asked else None


def open_question(turns: Sequence[Turn], name: str) -> tuple[list[str], ChatExample]:
    """What system turns say, and the example that the model is to answer, without its output. An answer at the end
    that is a target is left out: the model is asked what it was trained to say."""
    system, exchanges, asked = _exchanges(turns)
    if asked:
        instruction = _joined(asked)
    elif exchanges and exchanges[-1].answer.is_target:
        instruction = exchanges.pop().instruction
    elif exchanges:
        where = exchanges[-1].answer.where
        reason = f"'{where}' has weight 0, so it is history, and no user turn after it asks anything. Add one."
        raise Fault(where, "no user turn at the end", reason)
    else:
        raise Fault(name, "no user turn", f"'{name}' has no user turn, so nothing is asked. Add one.")
    history = tuple((exchange.instruction, exchange.answer.text) for exchange in exchanges)
    return system, ChatExample(instruction, history, "")


class _Exchange(NamedTuple):
    instruction: str
    answer: Turn


def _exchanges(turns: Sequence[Turn]) -> tuple[list[str], list[_Exchange], list[Turn]]:
    """What system turns say, each answer with its question, and the user turns at the end that nobody answers."""
    system: list[str] = []
    exchanges: list[_Exchange] = []
    asked: list[Turn] = []
    for turn in turns:
        if turn.role == "system":
            if asked or exchanges:
                raise _bad_order(turn, "a system turn after the conversation has begun")
            system.append(turn.text)
        elif turn.role == "user":
            asked.append(turn)
        elif not asked:
            raise _bad_order(turn, "an assistant turn with no user turn before it")
        else:
            exchanges.append(_Exchange(_joined(asked), turn))
            asked = []
    return system, exchanges, asked


def _joined(asked: Sequence[Turn]) -> str:
    return "\n".join(turn.text for turn in asked)


def _bad_order(turn: Turn, what: str) -> Fault:
    reason = f"'{turn.where}' is {what}: system turns come first, then a user turn before each assistant turn."
    return Fault(turn.where, "bad order of turns", reason)
