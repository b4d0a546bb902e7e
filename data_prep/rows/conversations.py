"""From a conversation to examples: each answer is one, with the question before it and all earlier turns.

    system     Be brief.            system        "Be brief."
    user       Hi.                  example 1     "Hi." → "Hello."
    assistant  Hello.
    user       Who are you?         example 2     "Who are you?" → "A model.", after (("Hi.", "Hello."),)
    assistant  A model.

Consecutive user turns and several system turns are joined by a newline; text parts of one message by nothing, as chat
templates do. What has no place in an example is a fault: turns and calls of tools, images and other parts that are no
text, a system turn after the first user turn, an answer without a question. Of other keys of a turn only its marks are
read (`weight: 0`, `train: false`, `masked: true` …): an assistant turn that is marked as not to be learned from is
history and not an example. All other keys with a value are named in a warning (`unused_in_turns`).

At inference, a conversation is one question (`open_question`): its last user turn, with all turns before it.

An answer costs 5 µs.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from diptych.data_prep.rows.valid_text import (
    BLANK,
    Fault,
    described,
    from_json_text,
    from_object_of_lists,
    has_value,
    is_missing,
    missing,
    some_list,
    text,
    unread,
    without_index,
)

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {
    **{"system": "system", "human": "user", "user": "user"},
    **dict.fromkeys(("gpt", "assistant", "chatgpt"), "assistant"),
}
TOOL_ROLES = {"tool", "function", "function_call", "tool_call", "observation", "tool_response", "ipython"}

MARKS = dict.fromkeys("weight loss loss_weight loss_mask train training trainable".split(), True) | {"masked": False}
"""Keys that mark whether a turn is learned from, and whether 1 or true means that it is: those of OpenAI and ShareGPT
(`weight`), ms-swift (`loss`), axolotl (`train`, `training`) and others."""

PARTS_OF_A_TURN = "marks parts of a turn, which is learned from as a whole or not at all. Mark the whole turn instead."
MARKS_NOT_READ = {
    "mask": "can mean that the turn is learned from, or that it is not. Call it 'loss_mask' (1: it is) or 'masked' (1:"
    " it is not).",
    "train_detail": PARTS_OF_A_TURN,
    "training_detail": PARTS_OF_A_TURN,
}
YES_OR_NO = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}

MEDIA = frozenset(
    f"{name}{ending}"
    for name in ("image", "video", "audio")
    for ending in ("", "s", "_url", "_urls", "_path", "_paths", "_file", "_files")
) | {"pixel_values"}
"""Keys of a turn or a row that hold pictures, sound or video."""

MAX_TURNS = 1000
"""Answers in one conversation. Each becomes an example with all before it, so their size grows with the square."""


class Turn(NamedTuple):
    """One message of a conversation. `where` is its text, as in `messages[2].content`."""

    role: str
    text: str
    where: str
    is_target: bool


def turns_of(
    value: Any, name: str, role_key: str, text_key: str, roles: Mapping[str, str], may_be_empty: bool = False
) -> list[Turn]:
    """The turns in the column `name`; `roles` says which role of ours each role of the data is. In a row to learn
    from, only system turns may be empty; with `may_be_empty`, any turn may."""
    turns = some_list(value, name, "a list of turns")
    form = role_key, text_key, roles, may_be_empty
    return [_turn(from_json_text(turn), f"{name}[{number}]", *form) for number, turn in enumerate(turns)]


def _turn(turn: Any, where: str, role_key: str, text_key: str, roles: Mapping[str, str], may_be_empty: bool) -> Turn:
    if not isinstance(turn, Mapping):
        reason = f"'{where}' is {described(turn)}, and a turn with '{role_key}' and '{text_key}' is due."
        raise Fault(where, f"'{without_index(where)}' is not a turn", reason)
    written = turn.get(role_key)
    role = roles.get(written) if isinstance(written, str) else None
    is_tool = role is None and isinstance(written, str) and written in TOOL_ROLES
    if turn.get("tool_calls") or turn.get("function_call") or is_tool:
        reason = f"'{where}' calls a tool or is a tool's answer, and only text is read."
        raise Fault(f"{where}.{role_key}", "tool turn", f"{reason} Write it as text, or leave the conversation out.")
    if role_key not in turn or text_key not in turn:
        raise missing(text_key if role_key in turn else role_key, turn, (role_key, text_key), where=where)
    if role is None:
        reason = f"'{where}.{role_key}' is {described(written)}; known are {', '.join(roles)}."
        raise Fault(f"{where}.{role_key}", "unknown role", reason)
    if media := next((name for name in turn if name in MEDIA and has_value(turn[name])), None):
        reason = f"'{where}.{media}' belongs to the turn, and only text is read. Leave the conversation out."
        raise Fault(f"{where}.{media}", "part that is no text", reason)
    place = f"{where}.{text_key}"
    may_be_empty = may_be_empty or role == "system"
    content = text(_content(turn[text_key], place), place, may_be_empty, what=f"{role} turn")
    return Turn(role, content, place, is_target=_is_learned_from(turn, where) and role == "assistant")


def _is_learned_from(turn: Mapping[str, Any], where: str) -> bool:
    """What the marks of a turn say; True if it has none."""
    if turn.keys().isdisjoint(MARKS) and turn.keys().isdisjoint(MARKS_NOT_READ):
        return True
    if name := next((name for name in MARKS_NOT_READ if has_value(turn.get(name))), None):
        reason = f"'{where}.{name}' {MARKS_NOT_READ[name]}"
        raise Fault(f"{where}.{name}", "mark of a turn that is not read", reason)
    marks: dict[str, bool] = {}
    for name, value in ((name, turn[name]) for name in MARKS if not is_missing(turn.get(name))):
        written = str(value).strip().lower() if isinstance(value, str | int | float) else ""
        if written not in YES_OR_NO:
            due = "1 or true is due for a turn that is learned from, 0 or false for one that is not"
            reason = f"'{where}.{name}' is {described(value)}; {due}, since every target token counts the same."
            raise Fault(f"{where}.{name}", f"'{without_index(where)}.{name}' is neither 0 nor 1", reason)
        marks[name] = YES_OR_NO[written] is MARKS[name]
    if len(set(marks.values())) > 1:
        names = " and ".join(f"'{name}'" for name in marks)
        reason = f"{names} of '{where}' contradict each other on whether it is learned from. Drop one."
        raise Fault(f"{where}.{next(iter(marks))}", "marks of a turn that contradict each other", reason)
    return all(marks.values())


def unused_in_turns(turns: Any, name: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> Iterator[str]:
    """`messages.name`: keys of turns, and of their parts, that hold something and are not read; and marks by which a
    turn that is not the assistant's would be learned from."""
    turns = from_object_of_lists(turns)
    names = {role_key: {}, text_key: {"type": {}, "text": {}}, **dict.fromkeys(MARKS, {})}
    yield from unread(turns, name, names)
    for turn in turns if isinstance(turns, list | tuple) else ():
        if isinstance(turn, Mapping) and roles.get(str(turn.get(role_key))) in ("user", "system"):
            for mark in MARKS.keys() & turn.keys():
                if YES_OR_NO.get(str(turn[mark]).lower()) is MARKS[mark]:
                    yield f"{name}.{mark} of {turn[role_key]} turns"


def key_of_turns(value: Any) -> str | None:
    """`role` or `from`, whichever the first turn has; None if there are no turns."""
    turns = from_object_of_lists(value)
    turns = map(from_json_text, turns[:8]) if isinstance(turns, list | tuple) else ()
    keys = (key for turn in turns if isinstance(turn, Mapping) for key in ("role", "from") if key in turn)
    return next(keys, None)


def _content(value: Any, where: str) -> Any:
    """The text of a message that is written in parts: `[{"type": "text", "text": "Hi."}]`."""
    if not isinstance(value, list | tuple):
        return value
    texts = []
    for number, part in enumerate(value):
        place = f"{where}[{number}]"
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            what = described(part.get("type") if isinstance(part, Mapping) else part)
            reason = f"'{place}' is of type {what}; only parts of type 'text' are read."
            raise Fault(place, "part that is no text", reason)
        if "text" not in part:
            raise missing("text", part, ("type",), where=place)
        texts.append(text(part["text"], f"{place}.text", may_be_empty=True))
    return "".join(texts)


class ChatExample(NamedTuple):
    """One answer. `history` holds earlier (instruction, output) turns, oldest first."""

    instruction: str
    history: tuple[tuple[str, str], ...]
    output: str


def answers(turns: Sequence[Turn], name: str) -> tuple[list[str], list[ChatExample], Turn | None]:
    """The system prompts, the examples, and the user turn at the end that has no answer."""
    if sum(turn.role == "assistant" for turn in turns) > MAX_TURNS:
        raise Fault(name, "too many turns", f"'{name}' has more than {MAX_TURNS:,} assistant turns. Divide it.")
    system, exchanges, asked = _exchanges(turns)
    history = [(question, answer.text) for question, answer in exchanges]
    examples = [
        ChatExample(question, tuple(history[:place]), answer.text)
        for place, (question, answer) in enumerate(exchanges)
        if answer.is_target
    ]
    if not examples:
        marked = " that is not marked as history" if exchanges else ""
        raise Fault(name, "no assistant turn", f"'{name}' has no assistant turn to learn from{marked}.")
    return system, examples, asked[0] if asked else None


def open_question(turns: Sequence[Turn], name: str) -> tuple[list[str], ChatExample]:
    """The system prompts, and the example that the model is to answer, without its output. An answer at the end that
    is a target is left out: the model is asked the question that it was trained on."""
    system, exchanges, asked = _exchanges(turns)
    if asked:
        instruction = "\n".join(turn.text for turn in asked)
    elif exchanges and exchanges[-1][1].is_target:
        instruction, _ = exchanges.pop()
    elif exchanges:
        where = exchanges[-1][1].where
        reason = f"'{where}' is marked as history, and no user turn after it asks anything. Add one."
        raise Fault(where, "no user turn at the end", reason)
    else:
        raise Fault(name, "no user turn", f"'{name}' has no user turn, so nothing is asked. Add one.")
    if BLANK.fullmatch(instruction):
        raise Fault(name, "empty user turn", f"the last user turn of '{name}' is empty, so nothing is asked. Fill it.")
    history = tuple((question, answer.text) for question, answer in exchanges)
    return system, ChatExample(instruction, history, "")


def _exchanges(turns: Sequence[Turn]) -> tuple[list[str], list[tuple[str, Turn]], list[Turn]]:
    """The system prompts, each question with its answer, and the user turns at the end that have no answer."""
    system, exchanges, asked = [], [], []
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
            exchanges.append(("\n".join(turn.text for turn in asked), turn))
            asked = []
    return system, exchanges, asked


def _bad_order(turn: Turn, what: str) -> Fault:
    reason = f"'{turn.where}' is {what}: system turns come first, then a user turn before each assistant turn."
    return Fault(turn.where, "bad order of turns", reason)
