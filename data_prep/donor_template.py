"""The tokenizer of a decoder-only LLM in; out, one for an encoder-decoder made of it, with a template of two sides.

    prompt = donor_prompt(tokenizer, "Qwen/Qwen3-0.6B", eos_token_ids=[151645, 151643])

    the LLM's prompt     <|im_start|>user\\nName the capital.<|im_end|>\\n<|im_start|>assistant\\n
    source               <|im_start|>user\\nName the capital.<|im_end|>\\n<|im_start|>assistant
    decoder start token                                                                         \\n
    target                                                                                        Paris<|im_end|>

Source, start token and target, one behind the other, are what the LLM itself would have read and written. Its chat
template is not run for each row, but asked once: it renders conversations whose texts are unmistakable, and what
stands between these is the frame, written down as a template of ours, which people can read. Then other conversations
are rendered by both; a kind (system prompts, earlier turns) on which they differ is left out, and said.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tokenizers import processors

from diptych.data_prep.encode import encode_sources, encode_targets
from diptych.data_prep.records import UserError
from diptych.data_prep.templates import Template, attach_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "donor"
PADS = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>")
"""Tokens that LLMs without a padding token keep for it."""

SYSTEM, USERS, ANSWERS = "Qsystemq", ("Quserq", "Qsecondq", "Qthirdq"), ("Qanswerq", "Qanotherq")
Messages = list[dict[str, str]]

Conversation = tuple[str, tuple[tuple[str, str], ...], str]
"""System prompt, earlier turns, instruction."""
CHECKED: tuple[Conversation, ...] = (
    ("", (), "Name the capital of France."),
    ("", (), "  {{ braces }} and\n\nlines, {% if %} \\n and 한국어 🙂  "),
    ("Be brief.", (), "Why?"),
    ("", (("Hello!", "Hi."),), "And now?"),
    ("", (("Hello!", " Hi. "), ("한국어?", "네."), ("x", "y\n")), "And now?"),
    ("Be brief.\nAnd kind. ", (("Hello!", "Hi."), ("a", "b")), " And now?\n"),
)


@dataclass(frozen=True)
class DonorPrompt:
    tokenizer: PreTrainedTokenizerBase
    """A copy, which puts nothing around texts by itself and carries the template."""
    template: Template
    decoder_start_token_id: int
    notes: list[str]
    """What is otherwise than the LLM has it, in sentences."""


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around texts."""

    head: str
    """Before the first user's text, where there is no system prompt."""
    after_user: str
    """After the last user's text: the generation prompt."""
    before_answer: str
    """Between generation prompt and the answer, in training (Qwen3: an empty thought)."""
    after_answer: str
    system_head: str | None = None
    """None where it takes no system prompt."""
    after_system: str = ""
    to_answer: str | None = None
    """Between an earlier question and its answer; None where it takes no earlier turns."""
    to_question: str = ""
    trims: bool = False
    """Whether texts lose the blanks around them."""


def donor_prompt(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int | None = None,
) -> DonorPrompt:
    """`eos_token_ids` and `pad_token_id` are those of the LLM's configs, which may know more than its tokenizer.

    UserError where its prompts cannot be divided into a source and what the decoder starts with.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{name} has no tokenizer.json, and only such tokenizers can be kept. Convert it first.")
    bare, notes = _bare(tokenizer, name), []
    _set_pad(bare, pad_token_id, notes)
    if tokenizer.chat_template:
        frame, conversations = _probed(tokenizer, name, notes)
    else:
        frame, conversations = _base_frame(tokenizer), []
        notes.append(
            "There is no chat template: a prompt is the instruction, the input in a new line, and a line end."
        )
    eos = _set_eos(bare, frame, eos_token_ids)
    start, shown = _divided(bare, frame, name)
    template = Template(NAME, _source(frame, shown), _target(frame, eos))
    _compare_tokens(tokenizer, bare, template, start, conversations, notes)
    attach_template(bare, template)
    return DonorPrompt(bare, template, start, notes)


# The frame


def _probed(
    tokenizer: PreTrainedTokenizerBase, name: str, notes: list[str]
) -> tuple[Frame, list[tuple[Conversation, str]]]:
    """The frame, and the checked conversations that it can render, with the LLM's own prompts."""
    frame = _probe(tokenizer, name)
    for kind, without in (
        ("earlier turns", {"to_answer": None}),
        ("system prompts", {"system_head": None}),
    ):
        if _faults(tokenizer, frame):
            frame = replace(frame, **without)
            if not _faults(tokenizer, frame):
                notes.append(f"The chat template writes {kind} in a way of its own: ours has no place for them.")
    if faults := _faults(tokenizer, frame):
        ours, theirs = faults[0]
        raise UserError(
            f"the chat template of {name} is none that can be written as a frame: it gives {theirs!r}, and a frame"
            f" {ours!r}. Take the template out of the tokenizer, and give one to `diptych prepare --template`."
        )
    if "strftime" in str(tokenizer.chat_template):
        notes.append(f"The chat template of {name} writes today's date; ours has that of this day for ever.")
    if frame.system_head is not None:
        opening = frame.head[_common(frame.head, frame.system_head) :]
        if not frame.after_system.endswith(opening):
            notes.append(f"Where there is no system prompt, prompts begin with {frame.head!r}, as the LLM's do.")
    if frame.before_answer:
        notes.append(f"Targets begin with {frame.before_answer!r}, as the LLM's answers do in training.")
    rendered = [(it, _rendered(tokenizer, _messages(it))) for it in CHECKED if _has_place(frame, it)]
    return frame, [(it, prompt) for it, prompt in rendered if prompt is not None]


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _probe(tokenizer: PreTrainedTokenizerBase, name: str) -> Frame:
    question = [_user(USERS[0])]
    prompt = _rendered(tokenizer, question)
    parts = _between(prompt, USERS[:1])
    if parts is None or not parts[1]:
        raise UserError(
            f"the chat template of {name} does not render a question and the beginning of an answer. Take it out of"
            f" the tokenizer, and give one to `diptych prepare --template`."
        )
    head, after_user = parts
    answered = _between(_rendered(tokenizer, [*question, _assistant(ANSWERS[0])], ends=True), (USERS[0], ANSWERS[0]))
    if answered is None or answered[0] != head or not answered[1].startswith(after_user):
        raise UserError(
            f"the chat template of {name} writes answers otherwise than its prompts begin them. Take it out of the"
            f" tokenizer, and give one to `diptych prepare --template`."
        )
    padded = _rendered(tokenizer, [_user(f"  {USERS[0]}  ")])
    frame = Frame(head, after_user, answered[1][len(after_user) :], answered[2], trims=padded == prompt)
    system = _between(_rendered(tokenizer, [_system(SYSTEM), *question]), (SYSTEM, USERS[0]))
    if system is not None and system[2] == after_user:
        frame = replace(frame, system_head=system[0], after_system=system[1])
    turns = [_user(USERS[0]), _assistant(ANSWERS[0]), _user(USERS[1])]
    history = _between(_rendered(tokenizer, turns), (USERS[0], ANSWERS[0], USERS[1]))
    if history is not None and history[0] == head and history[3] == after_user:
        frame = replace(frame, to_answer=history[1], to_question=history[2])
    return frame


def _base_frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Of a base model: its beginning of text, if it has one, and a line end before what it is to write."""
    adds = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    head = tokenizer.bos_token if adds else ""
    return Frame(head, "\n", "", "", system_head=head, after_system="\n\n", to_answer="\n", to_question="\n\n")


def _faults(tokenizer: PreTrainedTokenizerBase, frame: Frame) -> list[tuple[str, str]]:
    """Where the frame and the chat template differ, on the conversations that the frame has a place for."""
    template = Template(NAME, _source(frame, frame.after_user))
    found = []
    for it in CHECKED:
        theirs = _rendered(tokenizer, _messages(it)) if _has_place(frame, it) else None
        if theirs is not None:
            system, history, instruction = it
            ours = template.render_source(instruction, "", history, system)
            found += [(str(ours), theirs)] if ours != theirs else []
    return found


def _has_place(frame: Frame, conversation: Conversation) -> bool:
    system, history, _ = conversation
    return (not system or frame.system_head is not None) and (not history or frame.to_answer is not None)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, ends: bool = False) -> str | None:
    """By the LLM's own template; None where it refuses this kind of conversation."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not ends)
    except Exception:  # a template raises what it likes, and means that it has no place for this
        return None


def _between(text: str | None, markers: Sequence[str]) -> list[str] | None:
    """What stands before, between and behind the markers; None where they do not stand in this order, once each."""
    if text is None or any(text.count(marker) != 1 for marker in markers):
        return None
    parts = []
    for marker in markers:
        before, found, text = text.partition(marker)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def _messages(conversation: Conversation) -> Messages:
    system, history, instruction = conversation
    turns = [message for told, said in history for message in (_user(told), _assistant(said))]
    return [*([_system(system)] if system else []), *turns, _user(instruction)]


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# The template


def _source(frame: Frame, after_user: str) -> str:
    trim = "|trim" if frame.trims else ""
    source = _literal(frame.head)
    if frame.system_head is not None:
        system = _literal(frame.system_head) + f"{{{{ system{trim} }}}}" + _literal(frame.after_system)
        source = f"{{% if system %}}{system}{{% else %}}{source}{{% endif %}}"
    if frame.to_answer is not None:
        turn = (
            f"{{{{ turn[0]{trim} }}}}{_literal(frame.to_answer)}{{{{ turn[1]{trim} }}}}{_literal(frame.to_question)}"
        )
        source += f"{{% for turn in history %}}{turn}{{% endfor %}}"
    joined = '(instruction ~ "\\n\\n" ~ input)' if frame.after_user != "\n" else '(instruction ~ "\\n" ~ input)'
    asked = f"{{% if input %}}{{{{ {joined}{trim} }}}}{{% else %}}{{{{ instruction{trim} }}}}{{% endif %}}"
    return source + asked + _literal(after_user)


def _target(frame: Frame, eos: str) -> str:
    suffix, found, _ = frame.after_answer.partition(eos)
    return _literal(frame.before_answer) + "{{ output }}" + (_literal(suffix) if found else "")


def _literal(text: str) -> str:
    """As Jinja writes it: as it is, or as a string where Jinja would take something for its own, or a line end off."""
    is_plain = text == text.strip("\n") and not any(mark in text for mark in ("{{", "{%", "{#", "}}", "%}", "#}"))
    return text if is_plain else f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"


# The tokens


def _bare(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """A copy that puts nothing around texts, also once it is saved: what belongs there stands in the template."""
    bare = copy.deepcopy(tokenizer)
    for setting in ("add_bos_token", "add_eos_token"):
        if hasattr(bare, setting) or setting in bare.init_kwargs:
            setattr(bare, setting, False)
            bare.init_kwargs[setting] = False
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    with tempfile.TemporaryDirectory() as folder:
        bare.save_pretrained(folder)
        again = type(bare).from_pretrained(folder)
    for text in ("a. 1", "한"):
        if again(text)["input_ids"] != again(text, add_special_tokens=False)["input_ids"]:
            raise UserError(
                f"the tokenizer of {name} ({type(tokenizer).__name__}) puts tokens around each text, which cannot be"
                f" switched off. Save it as a PreTrainedTokenizerFast without a post-processor, and pair again."
            )
    return bare


def _set_pad(tokenizer: PreTrainedTokenizerBase, pad_token_id: int | None, notes: list[str]) -> None:
    if tokenizer.pad_token is not None:
        return
    vocabulary = tokenizer.get_vocab()
    token = tokenizer.convert_ids_to_tokens(pad_token_id) if pad_token_id is not None else None
    token = token or next((name for name in PADS if name in vocabulary), None) or tokenizer.unk_token
    tokenizer.pad_token = token or tokenizer.eos_token
    notes.append(f"The LLM's tokenizer has no padding token; {tokenizer.pad_token} is it now.")


def _set_eos(tokenizer: PreTrainedTokenizerBase, frame: Frame, eos_token_ids: Sequence[int]) -> str:
    """The token that ends an answer, which becomes the tokenizer's end token."""
    names = [tokenizer.convert_ids_to_tokens(token) for token in eos_token_ids]
    candidates = [token for token in (tokenizer.eos_token, *names) if token]
    if not candidates:
        raise UserError("neither the tokenizer nor the configs name an end token. Set eos_token_id in config.json.")
    places = {token: frame.after_answer.find(token) for token in candidates}
    found = [token for token in candidates if places[token] >= 0]
    tokenizer.eos_token = min(found, key=lambda token: places[token]) if found else candidates[0]
    return tokenizer.eos_token


def _divided(tokenizer: PreTrainedTokenizerBase, frame: Frame, name: str) -> tuple[int, str]:
    """The last token of the generation prompt, and that prompt's text without it."""
    sample = Template(NAME, _source(frame, frame.after_user)).render_source("Name it.")
    (whole,) = encode_sources(tokenizer, [sample])
    for length in range(1, len(frame.after_user) + 1):
        shown = frame.after_user[:-length]
        (ids,) = encode_sources(tokenizer, [Template(NAME, _source(frame, shown)).render_source("Name it.")])
        if ids == whole[:-1]:
            return whole[-1], shown
    tokens = tokenizer.convert_ids_to_tokens(whole[-4:])
    raise UserError(
        f"the prompts of {name} end in tokens that no text ends in alone ({' '.join(tokens)}), so a source cannot end"
        f" before the last one. Give another chat template to its tokenizer, one that ends in a token of its own."
    )


def _compare_tokens(
    tokenizer: PreTrainedTokenizerBase,
    bare: PreTrainedTokenizerBase,
    template: Template,
    start: int,
    conversations: Sequence[tuple[Conversation, str]],
    notes: list[str],
) -> None:
    """A note for the first conversation whose tokens are not the LLM's: where a text meets an answer, words may be cut
    otherwise than in one text."""
    for (system, history, instruction), prompt in conversations:
        theirs = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        (source,) = encode_sources(bare, [template.render_source(instruction, "", history, system)])
        if [*source, start] != theirs:
            notes.append(f"Prompts are cut into other tokens than the LLM's, such as that of {instruction!r}.")
            return
    for output in ("Paris.", "네.") if conversations else ():
        messages = [_user("Name it."), _assistant(output)]
        theirs = tokenizer(_rendered(tokenizer, messages, ends=True) or "", add_special_tokens=False)["input_ids"]
        (source,) = encode_sources(bare, [template.render_source("Name it.")])
        (labels,) = encode_targets(bare, [template.render_target(output)])
        ours = [*source, start, *labels]
        if theirs[: len(ours)] != ours:
            notes.append(f"Answers are cut into other tokens than the LLM's, such as {output!r}: it learns ours.")
            return
