"""The tokenizer of a decoder-only LLM in; out, one for an encoder-decoder made of it, with a template of two sides.

    prompt = donor_prompt(tokenizer, "Qwen/Qwen3-0.6B", eos_token_ids=[151645, 151643])

    the LLM's prompt     <|im_start|>user\\nName the capital.<|im_end|>\\n<|im_start|>assistant\\n
    source               <|im_start|>user\\nName the capital.<|im_end|>\\n<|im_start|>assistant
    decoder start token                                                                         \\n
    target                                                                                        Paris<|im_end|>

Source, start token and target, one behind the other, are what the LLM itself would have read and written. Its chat
template is not run for each row, but asked once: it renders conversations whose texts are unmistakable, and what
stands between these is the frame, written down as a template of ours, which people can read. Then other conversations
are rendered by both, and compared in text and in tokens; a kind (system prompts, earlier turns) on which the texts
differ is left out, and said.

One difference is wanted. Where a row holds the characters `</s>`, the LLM's own tokenizer makes its end token of them;
here they stay text (encode.py).
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tokenizers import processors

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.checkpoint_tokenizer import open_tokenizer
from diptych.data_prep.text_to_ids.encode import encode_sources, split_targets
from diptych.data_prep.text_to_ids.templates import Template, attach_template, golden_difference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "donor"
PADS = re.compile(r"<\|(finetune|reserved)[^|]*pad[^|]*\|>|<pad>|\[PAD\]|<\|pad\|>")
"""Tokens that LLMs without a padding token keep for it."""
JINJA_MARKS = re.compile(r"\{[{%#]|[}%#]\}|\{\Z|\r")
"""What Jinja would take for its own in the open, an opening brace before our `{{`, and line ends that it changes."""

SYSTEM, USERS, ANSWER = "Qsystemq", ("Quserq", "Qsecondq"), "Qanswerq"
Messages = list[dict[str, str]]

Conversation = tuple[str, tuple[tuple[str, str], ...], str]
"""System prompt, earlier turns, instruction."""
THREE_TURNS = (("Hello!", "Hi."), ("한국어?", "네."), ("x\ny", "z"))
CHECKED: tuple[Conversation, ...] = (
    ("", (), "Name the capital of France."),
    ("", (), "{{ braces }} and\n\nlines, {% if %} {# x #} \\n and 한국어 🙂"),
    ("Be brief.", (), "Why?"),
    ("", (("Hello!", "Hi."),), "And now?"),
    ("Be brief.\nAnd {{ kind }}.", (("Hello!", "Hi."),), "And now?"),
    ("", THREE_TURNS, "And now?"),
    ("Be kind.", THREE_TURNS, "And\nnow"),
)
"""On these our template has to give what the LLM's gives."""
BLANKS: tuple[Conversation, ...] = (
    ("", (), "  x\n"),
    (" Be brief. ", (), " Why?"),
    ("Be brief.\n", (("\nHello!", " Hi. "), (" a", "\nb\n")), "And now?  "),
)
"""Chat templates do many things with blanks around texts: a difference here is said, and nothing left out for it."""
ANSWERS = ("Paris.", "네, 🙂", "It is\n  two {{ lines }}", "  x = 1\n")


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
    """What a chat template writes around texts.

    bos head                            QUESTION to_answer ANSWER to_question QUESTION after_user
    bos system_head SYSTEM after_system QUESTION after_user before_answer ANSWER after_answer
    """

    bos: str
    head: str
    """Before the first question, where there is no system prompt."""
    after_user: str
    """After the last question: the generation prompt."""
    before_answer: str | None
    """Between generation prompt and answer, in conversations that have one (Qwen3: an empty thought); None where their
    answers begin otherwise than the generation prompt does."""
    after_answer: str
    system_head: str | None = None
    """None where it takes no system prompt."""
    after_system: str = ""
    is_system_last: bool = False
    """Whether the system prompt stands before the last question, as Mistral has it, and not before the first."""
    to_answer: str | None = None
    """None where it takes no earlier turns."""
    to_question: str = ""
    joint: str = "\n\n"
    """Between instruction and input."""
    trim_system: str = ""
    """`|trim` and the like: which blanks around a text are lost."""
    trim_user: str = ""
    trim_answer: str = ""


def donor_prompt(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int | None = None,
) -> DonorPrompt:
    """`eos_token_ids` and `pad_token_id` are those of the LLM's configs, which may know more than its tokenizer.

    Raises:
        UserError: its prompts cannot be divided into a source and what the decoder starts with, or its tokenizer
            cannot be kept as one that puts nothing around texts.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{name} has no tokenizer.json ({type(tokenizer).__name__}), and only such tokenizers can be kept. Write"
            f" one beside its files: transformers.convert_slow_tokenizer.convert_slow_tokenizer(tokenizer).save(…)"
        )
    notes: list[str] = []
    bare = _bare(tokenizer)
    if tokenizer.chat_template:
        frame = _probed(tokenizer, name, notes)
        closing = _set_eos(bare, frame, eos_token_ids, name, notes)
        start, shown = _divided(bare, frame, name)
        target = _matching_target(tokenizer, bare, frame, closing, notes)
        template = Template(NAME, _source(frame, shown), target)
        _compare_prompts(tokenizer, bare, frame, template, start, notes)
    else:
        frame = _base_frame(tokenizer, notes)
        _set_eos(bare, frame, eos_token_ids, name, notes)
        start, template = _base_start(bare, notes), Template(NAME, _source(frame, ""))
    _set_pad(bare, pad_token_id, notes)
    attach_template(bare, template)
    _check_saved(bare, template, name)
    return DonorPrompt(bare, template, start, notes)


# The frame


def _probed(tokenizer: PreTrainedTokenizerBase, name: str, notes: list[str]) -> Frame:
    """The frame of a chat template, with a place for what it renders as the template does."""
    full = _probe(tokenizer, name, notes)
    no_system, no_history = {"system_head": None}, {"to_answer": None}
    for without in ({}, no_system, no_history, no_system | no_history):
        frame = replace(full, **without)
        faults = list(_faults(tokenizer, frame, CHECKED))
        if not faults:
            break
    else:
        ours, theirs = faults[0]
        raise UserError(
            f"the chat template of {name} is none that can be written as a frame around texts: it gives"
            f" {_end(theirs)}, and a frame gives {_end(ours)}. {_way_out(name)}"
        )
    for field, kind in (("system_head", "system prompts"), ("to_answer", "earlier turns")):
        if getattr(full, field) is None:
            notes.append(f"The chat template has no place for {kind}, and so ours has none.")
        elif getattr(frame, field) is None:
            notes.append(f"The chat template writes {kind} in a way of its own: ours has no place for them.")
    _note_what_is_fixed(tokenizer, frame, name, notes)
    _note_changed_texts(tokenizer, frame, notes)
    return frame


def _note_what_is_fixed(tokenizer: PreTrainedTokenizerBase, frame: Frame, name: str, notes: list[str]) -> None:
    question = [_user(USERS[0])]
    if any(
        _rendered(tokenizer, messages) and not _rendered(tokenizer, messages, strftime_now="no function")
        for messages in (question, [_system(SYSTEM), *question])
    ):
        notes.append(f"The chat template of {name} writes today's date; ours has that of this day for ever.")
    if frame.system_head is not None:
        opening = frame.head[_common(frame.head, frame.system_head) :]
        if not frame.after_system.endswith(opening):
            begin = frame.bos + frame.head
            notes.append(f"Where there is no system prompt, prompts begin with {begin!r}, as the LLM's do.")


def _note_changed_texts(tokenizer: PreTrainedTokenizerBase, frame: Frame, notes: list[str]) -> None:
    trims = {"system prompts": frame.trim_system, "questions": frame.trim_user, "answers": frame.trim_answer}
    if kinds := [kind for kind, trim in trims.items() if trim]:
        notes.append(f"Blanks around {', '.join(kinds)} are lost, as the chat template has it.")
    spelled = [("", (), f"Is {token} a word?") for token in tokenizer.all_special_tokens]
    for conversations, which in ((BLANKS, "with blanks around them"), (spelled, "that spell control tokens")):
        if fault := next(_faults(tokenizer, frame, conversations), None):
            ours, theirs = map(_end, fault)
            notes.append(f"The chat template changes texts {which} as ours does not: {theirs}, where ours is {ours}.")


def _probe(tokenizer: PreTrainedTokenizerBase, name: str, notes: list[str]) -> Frame:
    """What stands between the texts of conversations of each kind."""
    question, answer, system = [_user(USERS[0])], [_assistant(ANSWER)], [_system(SYSTEM)]
    try:
        prompt = _render(tokenizer, question)
    except Exception as error:  # a template raises what it likes
        raise UserError(f"the chat template of {name} fails on a question: {error}. {_way_out(name)}") from error
    parts = _between(prompt, USERS[:1])
    if parts is None or not parts[1]:
        raise UserError(
            f"the chat template of {name} does not render a question and the beginning of an answer, but"
            f" {_end(prompt)}. {_way_out(name)}"
        )
    head, after_user = parts
    answered = _between(_rendered(tokenizer, question + answer, ends=True), (USERS[0], ANSWER))
    if answered is None or answered[0] != head:
        raise UserError(f"the chat template of {name} does not render a question and its answer. {_way_out(name)}")
    before_answer = answered[1].removeprefix(after_user)
    if not answered[1].startswith(after_user):
        before_answer = None
        notes.append(
            f"The LLM's prompts end in {after_user!r}, and in its conversations answers stand behind {answered[1]!r}:"
            f" ours end as its prompts do."
        )
    elif before_answer.strip() and _rendered(tokenizer, question, ends=True) == prompt:
        after_user, before_answer = answered[1], ""
        notes.append(f"The chat template writes no beginning of an answer; ours ends prompts in {after_user!r}.")
    bos = tokenizer.bos_token if tokenizer.bos_token and head.startswith(tokenizer.bos_token) else ""
    frame = Frame(bos, head.removeprefix(bos), after_user, before_answer, answered[2])
    opened = _between(_rendered(tokenizer, system + question), (SYSTEM, USERS[0]))
    if opened is not None and opened[0].startswith(bos):
        frame = replace(frame, system_head=opened[0].removeprefix(bos), after_system=opened[1])
    turns = [*question, *answer, _user(USERS[1])]
    history = _between(_rendered(tokenizer, turns), (USERS[0], ANSWER, USERS[1]))
    if history is not None and history[0] == head:
        frame = replace(frame, to_answer=history[1], to_question=history[2])
    last = _between(_rendered(tokenizer, system + turns), (USERS[0], ANSWER, SYSTEM, USERS[1]))
    return replace(
        frame,
        is_system_last=last is not None and (frame.system_head or "").startswith(frame.head),
        trim_user=_trim(lambda text: _rendered(tokenizer, [_user(text)])),
        trim_system=_trim(lambda text: _rendered(tokenizer, [_system(text), *question])),
        trim_answer=_trim(lambda text: _rendered(tokenizer, [*question, _assistant(text)], ends=True)),
    )


def _trim(render: Callable[[str], str | None]) -> str:
    """Which blanks around a text are lost, as a filter or method of Jinja."""
    bare = render("Qq")
    is_lost = {side: render(text) == bare for side, text in (("lstrip", " \nQq"), ("rstrip", "Qq \n"))}
    if bare is None or not any(is_lost.values()):
        return ""
    return "|trim" if all(is_lost.values()) else next(f".{side}()" for side, lost in is_lost.items() if lost)


def _base_frame(tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> Frame:
    """Of a base model: its beginning of text, if it has one, then paragraphs."""
    notes.append(
        "There is no chat template: a prompt is the instruction and, in a new line, the input; a system prompt and"
        " earlier turns stand before it as paragraphs."
    )
    adds = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    frame = Frame(tokenizer.bos_token if adds else "", "", after_user="", before_answer="", after_answer="")
    return replace(frame, system_head="", after_system="\n\n", to_answer="\n", to_question="\n\n", joint="\n")


def _faults(
    tokenizer: PreTrainedTokenizerBase, frame: Frame, conversations: Sequence[Conversation]
) -> Iterator[tuple[str, str]]:
    """Our text and theirs, where they differ, of conversations that the frame has a place for."""
    template = Template(NAME, _source(frame, frame.after_user))
    for conversation in conversations:
        if _has_place(frame, conversation):
            system, history, instruction = conversation
            ours = str(template.render_source(instruction, "", history, system))
            theirs = _prompt(tokenizer, frame, conversation)
            if ours != theirs:
                yield ours, theirs or "an error"


def _prompt(tokenizer: PreTrainedTokenizerBase, frame: Frame, conversation: Conversation) -> str | None:
    """The LLM's own prompt, with the beginning of an answer where its template writes none."""
    system, history, instruction = conversation
    turns = [message for told, said in history for message in (_user(told), _assistant(said))]
    text = _rendered(tokenizer, [*([_system(system)] if system else []), *turns, _user(instruction)])
    if text is None or text.endswith(frame.after_user):
        return text
    _, written = _between(_rendered(tokenizer, [_user(USERS[0])]), USERS[:1])
    return text + frame.after_user.removeprefix(written)


def _has_place(frame: Frame, conversation: Conversation) -> bool:
    system, history, _ = conversation
    return (not system or frame.system_head is not None) and (not history or frame.to_answer is not None)


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, ends: bool = False, **variables: str
) -> str | None:
    """None where the template refuses this kind of conversation."""
    try:
        return _render(tokenizer, messages, ends, **variables)
    except Exception:  # a template raises what it likes, and means that it has no place for this
        return None


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, ends: bool = False, **variables: str) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not ends, **variables)


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


def _common(one: str, other: str) -> int:
    """How many characters both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _way_out(name: str) -> str:
    return (
        f"Take it out (in the folder of {name}: chat_template.jinja, or chat_template in tokenizer_config.json), pair"
        f" it as a base model, and give a template of yours to `diptych prepare --template`."
    )


def _end(text: str) -> str:
    return repr(text if len(text) <= 200 else f"… {text[-200:]}")


# The template


def _source(frame: Frame, after_user: str) -> str:
    head, system, after_system = _system_pieces(frame)
    turns = ""
    if frame.to_answer is not None:
        told, said = f"{{{{ turn[0]{frame.trim_user} }}}}", f"{{{{ turn[1]{frame.trim_answer} }}}}"
        turn = told + _literal(frame.to_answer) + said + _literal(frame.to_question)
        turns = f"{{% for turn in history %}}{turn}{{% endfor %}}"
    before = head + turns + system if frame.is_system_last else head + system + after_system + turns
    return _whole(_literal(frame.bos) + before + _question(frame) + _literal(after_user))


def _system_pieces(frame: Frame) -> tuple[str, str, str]:
    """What stands before the system prompt, it itself with what is written for its sake, and what stands after it."""
    if frame.system_head is None:
        return _literal(frame.head), "", ""
    system = f"{{{{ system{frame.trim_system} }}}}"
    if frame.system_head + frame.after_system == frame.head:  # there always is one, be it empty
        return _literal(frame.system_head), system, _literal(frame.after_system)
    if frame.system_head.startswith(frame.head):  # in the user's turn
        own = _literal(frame.system_head.removeprefix(frame.head))
        return _literal(frame.head), f"{{% if system %}}{own}{system}{_literal(frame.after_system)}{{% endif %}}", ""
    if frame.after_system.endswith(frame.head):  # a turn of its own
        own = _literal(frame.after_system.removesuffix(frame.head))
        return "", f"{{% if system %}}{_literal(frame.system_head)}{system}{own}{{% endif %}}", _literal(frame.head)
    given = _literal(frame.system_head) + system + _literal(frame.after_system)
    return "", f"{{% if system %}}{given}{{% else %}}{_literal(frame.head)}{{% endif %}}", ""


def _question(frame: Frame) -> str:
    if not frame.trim_user:
        return f"{{{{ instruction }}}}{{% if input %}}{frame.joint}{{{{ input }}}}{{% endif %}}"
    joined = f"(instruction ~ {json.dumps(frame.joint)} ~ input){frame.trim_user}"
    return f"{{% if input %}}{{{{ {joined} }}}}{{% else %}}{{{{ instruction{frame.trim_user} }}}}{{% endif %}}"


def _target(frame: Frame, before_answer: str, closing: str) -> str:
    return _whole(f"{_literal(before_answer)}{{{{ output{frame.trim_answer} }}}}{_literal(closing)}")


def _literal(text: str) -> str:
    """As Jinja writes it: as it is, or as a string where Jinja would take something for its own."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if JINJA_MARKS.search(text) else text


def _whole(template: str) -> str:
    """Jinja takes a line end off the end of a template, but none out of a string."""
    return template[:-1] + '{{ "\\n" }}' if template.endswith("\n") else template


# The tokens


def _bare(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that puts nothing around texts: what belongs there stands in the template."""
    bare = copy.deepcopy(tokenizer)
    for setting in ("add_bos_token", "add_eos_token"):  # of which from_pretrained makes a post-processor anew
        setattr(bare, setting, False)
        bare.init_kwargs[setting] = False
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    return bare


def _check_saved(tokenizer: PreTrainedTokenizerBase, template: Template, name: str) -> None:
    """UserError where the tokenizer, saved and loaded, is another one, or puts tokens around texts."""
    advice = "Save it as a PreTrainedTokenizerFast without a post-processor, and pair again."
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        try:
            again = open_tokenizer(folder)
        except UserError as error:
            raise UserError(f"the tokenizer of {name} cannot be loaded once it is saved: {error} {advice}") from error
    for text in ("a. 1", "한"):
        if again(text)["input_ids"] != tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise UserError(
                f"the tokenizer of {name} ({type(tokenizer).__name__}) puts tokens around each text, which cannot be"
                f" switched off. {advice}"
            )
    ids = [(it.eos_token_id, it.pad_token_id, len(it)) for it in (tokenizer, again)]
    difference = golden_difference(again, template)
    if ids[0] != ids[1]:
        difference = f"end token, padding token and size were {ids[0]} and are {ids[1]}"
    if difference:
        raise UserError(
            f"the tokenizer of {name} ({type(tokenizer).__name__}) is another one once it is saved: {difference}."
            f" {advice}"
        )


def _set_pad(tokenizer: PreTrainedTokenizerBase, pad_token_id: int | None, notes: list[str]) -> None:
    if tokenizer.pad_token is not None:
        return
    reserved = sorted(filter(PADS.fullmatch, tokenizer.get_vocab()), key=tokenizer.convert_tokens_to_ids)
    token = _token(tokenizer, pad_token_id) or next(iter(reserved), None)
    tokenizer.pad_token = token or tokenizer.unk_token or tokenizer.eos_token
    notes.append(f"The LLM's tokenizer has no padding token; {tokenizer.pad_token} is it now.")


def _token(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> str | None:
    """None for what is no token's id: configs say -1, or name one beyond the vocabulary."""
    if token_id is None or not 0 <= token_id < len(tokenizer):
        return None
    return tokenizer.convert_ids_to_tokens(token_id)


def _set_eos(
    tokenizer: PreTrainedTokenizerBase, frame: Frame, eos_token_ids: Sequence[int], name: str, notes: list[str]
) -> str:
    """Makes the token that ends an answer the end token, and returns what stands between the two.

    Where the LLM does not know that token as an end, it belongs to the text, and the end token follows it.
    """
    named = tokenizer.eos_token
    candidates = [it for it in (named, *(_token(tokenizer, token_id) for token_id in eos_token_ids)) if it]
    if not candidates:
        raise UserError(
            f"neither the tokenizer of {name} nor its configs name an end token. Set eos_token_id in its config.json."
        )
    after = frame.after_answer
    found = [token for token in candidates if token in after]
    tokenizer.eos_token = min(found, key=after.find) if found else candidates[0]
    if named not in (None, tokenizer.eos_token):
        notes.append(f"The end token is {tokenizer.eos_token}, which ends the LLM's answers; it was {named}.")
    if found:
        return after[: after.find(tokenizer.eos_token)]
    if closing := after.rstrip():
        notes.append(
            f"The LLM's answers end in {closing!r}, which it does not name as an end: targets end in that, and then in"
            f" {tokenizer.eos_token}."
        )
    elif tokenizer.chat_template:
        notes.append(f"The chat template writes nothing that ends an answer; targets end in {tokenizer.eos_token}.")
    return closing


def _divided(tokenizer: PreTrainedTokenizerBase, frame: Frame, name: str) -> tuple[int, str]:
    """The last token of the generation prompt, and that prompt's text without it."""
    whole = _source_ids(tokenizer, frame, frame.after_user)
    for length in range(1, len(frame.after_user) + 1):
        shown = frame.after_user[:-length]
        if _source_ids(tokenizer, frame, shown) == whole[:-1]:
            return whole[-1], shown
    tokens = tokenizer.convert_ids_to_tokens(whole[-4:])
    raise UserError(
        f"the prompts of {name} end in tokens that no text ends in alone ({' '.join(tokens)}), so a source cannot end"
        f" before the last one. Give another chat template to its tokenizer, one that ends in a token of its own."
    )


def _source_ids(tokenizer: PreTrainedTokenizerBase, frame: Frame, after_user: str) -> list[int]:
    (ids,) = encode_sources(tokenizer, [Template(NAME, _source(frame, after_user)).render_source("Name it")])
    return ids


def _base_start(tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> int:
    """A line end, where it is one token; else what a text begins with."""
    without, with_end = encode_sources(tokenizer, ["a", "a\n"])
    if with_end[:-1] == without and tokenizer.decode(with_end[-1:]) == "\n":
        notes.append("The decoder starts with a line end.")
        return with_end[-1]
    token = tokenizer.bos_token or tokenizer.eos_token
    notes.append(f"No token is a line end and nothing else, so the decoder starts with {token}.")
    return tokenizer.convert_tokens_to_ids(token)


def _matching_target(
    tokenizer: PreTrainedTokenizerBase, bare: PreTrainedTokenizerBase, frame: Frame, closing: str, notes: list[str]
) -> str:
    """A target side that, behind the prompt, has the tokens of the LLM's own conversation; a note where it has not.

    A blank before an answer may be the one that tokenizers of words (▁Paris) put before each text themselves.
    """
    if frame.before_answer is None:
        return _target(frame, "", closing)
    wholes = [_rendered(tokenizer, [_user("Name it"), _assistant(answer)], ends=True) or "" for answer in ANSWERS]
    theirs = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in wholes]
    prompt = _source_ids(bare, frame, frame.after_user)
    has_eos = bare.eos_token in frame.after_answer
    unlike = {}
    for before in dict.fromkeys((frame.before_answer, frame.before_answer.removeprefix(" "))):
        template = Template(NAME, "", _target(frame, before, closing))
        labels = split_targets(bare, [template.render_target(answer) for answer in ANSWERS])
        ours = [[*prompt, *(it.ids() if has_eos else it.content)] for it in labels]
        unlike[before] = [
            answer for answer, own, their in zip(ANSWERS, ours, theirs, strict=True) if own != their[: len(own)]
        ]
    before = min(unlike, key=lambda it: len(unlike[it]))
    if unlike[before]:
        few = ", ".join(map(repr, unlike[before]))
        notes.append(f"Answers are cut into other tokens than the LLM's, such as {few}: it learns ours.")
    if before:
        notes.append(f"Targets begin with {before!r}, as the LLM's answers do in training.")
    return _target(frame, before, closing)


def _compare_prompts(
    tokenizer: PreTrainedTokenizerBase,
    bare: PreTrainedTokenizerBase,
    frame: Frame,
    template: Template,
    start: int,
    notes: list[str],
) -> None:
    """A note for the first conversation whose tokens are not the LLM's, and one if its own template gives others."""
    for conversation in CHECKED:
        if not _has_place(frame, conversation):
            continue
        system, history, instruction = conversation
        theirs = tokenizer(_prompt(tokenizer, frame, conversation), add_special_tokens=False)["input_ids"]
        (source,) = encode_sources(bare, [template.render_source(instruction, "", history, system)])
        if [*source, start] != theirs:
            notes.append(f"Prompts are cut into other tokens than the LLM's, such as that of {instruction!r}.")
            break
    turns = [_user("a"), _assistant("b"), _user("c")]
    if _rendered(tokenizer, turns) != _rendered(bare, turns):
        notes.append(
            "The LLM's chat template, which stays in the tokenizer, writes the new end token for the old one."
        )
