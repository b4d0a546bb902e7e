"""Answers that were judged: of two the preferred one, one that is liked or not, several with ratings.

    {"prompt": "Who?", "chosen": "Ann.", "rejected": "Bob."}
    {"chosen": [user, assistant "Ann."], "rejected": [user, assistant "Bob."]}     the prompt is what both begin with
    {"prompt": "Who?", "completion": "Ann.", "label": true}
    {"prompt": "Who?", "completions": [{"response": "Ann.", "score": 5}, {"response": "Bob.", "score": 1}]}

Prompts and answers are texts or turns, of OpenAI or of ShareGPT, or those of Anthropic's hh-rlhf; an answer is one
turn of the assistant.
"""

import math
import os.path
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from diptych.data_prep.rows.conversations import (
    ROLES,
    SHAREGPT_ROLES,
    YES_OR_NO,
    Turn,
    key_of_turns,
    turns_of,
)
from diptych.data_prep.rows.valid_text import (
    Fault,
    described,
    from_json_text,
    from_object_of_lists,
    missing,
    text,
)

FORMS = {
    None: ("role", "content", ROLES),
    "role": ("role", "content", ROLES),
    "from": ("from", "value", SHAREGPT_ROLES),
}
"""The keys and roles of turns, by what `key_of_turns` finds."""

ANTHROPIC = re.compile(r"\n\n(Human|Assistant): ?")
"""Stands before each turn in hh-rlhf, whose conversations are texts: "\\n\\nHuman: Who?\\n\\nAssistant: Ann."."""

TEXT_KEYS = ("response", "completion", "text", "content")
RATING_KEYS = ("overall_score", "score", "rating")
"""Of a completion with its rating, the first that it has."""


def as_turns(value: Any) -> Any:
    """A list of turns, also where it is one turn alone, JSON text, or a text of hh-rlhf; any other value as it is."""
    if isinstance(value, str) and ANTHROPIC.match(value):
        _, *parts = ANTHROPIC.split(value)
        roles = ({"Human": "user"}.get(who, "assistant") for who in parts[::2])
        return [{"role": role, "content": said} for role, said in zip(roles, parts[1::2], strict=True)]
    found = from_object_of_lists(value)
    if isinstance(found, Mapping) and not found.keys().isdisjoint(("role", "from")):
        found = [found]
    return found if not isinstance(value, str) or key_of_turns(found) is not None else value


def is_turns(value: Any) -> bool:
    return isinstance(as_turns(value), list | tuple)


def judged_turns(value: Any, name: str, are_turns: bool) -> list[Turn]:
    """The turns of a prompt or of an answer; a text is one answer. Text may be the JSON of turns only if `are_turns`,
    since it may be an answer that looks so."""
    found = as_turns(value) if are_turns or not isinstance(value, str) else value
    if not isinstance(found, list | tuple):
        return [Turn("assistant", text(value, name), name, True)]
    if not found:
        raise Fault(name, f"empty {name}", f"'{name}' has no turn: a row needs one to be learned from.")
    return turns_of(found, name, *FORMS[key_of_turns(found)])


def apart(answers: Mapping[str, list[Turn]]) -> tuple[list[Turn], list[Turn]]:
    """The turns that all begin with, and the answer that follows in each. Where each is an answer alone, the first are
    none."""
    shared = 0
    if all(turns[0].role != "assistant" for turns in answers.values()):
        beginnings = [[turn[:2] for turn in turns[:-1]] for turns in answers.values()]
        shared = len(os.path.commonprefix(beginnings))
        if not shared:
            name = next(reversed(answers))
            reason = (
                f"{' and '.join(answers)} are conversations that share no turn: the prompt is what both begin with."
            )
            raise Fault(name, "conversations without a shared beginning", reason)
    for name, turns in answers.items():
        if [turn.role for turn in turns[shared:]] != ["assistant"]:
            roles = ", ".join(turn.role for turn in turns[shared:])
            begin = "after what both share, " if shared else ""
            reason = f"{begin}'{name}' has the turns {roles}; one answer of the assistant is due."
            raise Fault(name, "not one answer", reason)
    first, *_ = answers.values()
    return first[:shared], [turns[shared]._replace(is_target=True) for turns in answers.values()]


def check_prompt(prompt: str | Sequence[Turn], shared: Sequence[Turn], name: str) -> None:
    """Fault where a row has a prompt, and its conversations begin with another."""
    asked = (
        [prompt.strip()] if isinstance(prompt, str) else [turn.text.strip() for turn in prompt if turn.role == "user"]
    )
    if not {turn.text.strip() for turn in shared}.issuperset(asked):
        reason = f"'{name}' is not in what the two conversations begin with. Drop the one that is wrong."
        raise Fault(name, "answers to another prompt", reason)


def check_pair(chosen: str, rejected: str, name: str) -> None:
    if chosen == rejected:
        reason = "the chosen and the rejected answer are the same text: neither is preferred."
        raise Fault(name, "same text in both answers", reason)


def mark_of(label: Any, name: str) -> int:
    """1 for an answer that is liked, -1 for one that is not."""
    if not is_mark(label):
        reason = f"'{name}' is {described(label)}; true or 1 is due if the answer is liked, false or 0 if not."
        raise Fault(name, f"'{name}' is neither true nor false", reason)
    return 1 if YES_OR_NO[str(label).strip().lower()] else -1


def is_mark(label: Any) -> bool:
    return isinstance(label, str | int | float) and str(label).strip().lower() in YES_OR_NO


def rated_answer(completion: Any, where: str) -> tuple[str, float]:
    """Text and rating of `{"response": "Ann.", "score": 5}`."""
    it = from_json_text(completion)
    if not isinstance(it, Mapping):
        reason = f"'{where}' is {described(it)}; an object with a text and a rating is due."
        raise Fault(where, "a completion that is not an object", reason)
    keys = [next((key for key in known if key in it), None) for known in (TEXT_KEYS, RATING_KEYS)]
    if None in keys:
        due = (TEXT_KEYS, RATING_KEYS)[keys.index(None)]
        raise missing(due[0], it, (*TEXT_KEYS, *RATING_KEYS), where=where)
    return text(it[keys[0]], f"{where}.{keys[0]}"), rating_of(it[keys[1]], f"{where}.{keys[1]}")


def rating_of(rating: Any, where: str) -> float:
    if isinstance(rating, bool) or not isinstance(rating, int | float) or not math.isfinite(rating):
        raise Fault(where, "rating that is no number", f"'{where}' is {described(rating)}, and a number is due.")
    return rating


def pairs_of_rated(
    texts: Sequence[str], ratings: Sequence[float], name: str, which: str, margin: float
) -> list[tuple[str, str]]:
    """(better, worse): the best and the worst answer, or `all` pairs, whose ratings differ, and by `margin` at least.
    Fault where there is no pair."""
    order = sorted(range(len(texts)), key=lambda place: -ratings[place])
    pairs = list(combinations(order, 2)) if which == "all" else [(order[0], order[-1])] if len(order) > 1 else []
    found = [
        (texts[better], texts[worse])
        for better, worse in pairs
        if ratings[better] > ratings[worse]
        and ratings[better] - ratings[worse] >= margin
        and texts[better] != texts[worse]
    ]
    if not found:
        shown = ", ".join(f"{rating:g}" for rating in ratings[:8])
        of = f"that differ by {margin:g}" if margin else "that differ"
        raise Fault(
            name, "no pair of ratings", f"no two different answers have ratings {of}; they are {shown or 'none'}."
        )
    return found
