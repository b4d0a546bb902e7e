"""The tokenizer of a decoder-only LLM in; out, one for an encoder-decoder made of it, with a template of two sides.

    prompt = donor_prompt(tokenizer, "Qwen/Qwen3-0.6B", eos_token_ids=[151645, 151643])

    the LLM's prompt     <|im_start|>user\\nName the capital.<|im_end|>\\n<|im_start|>assistant\\n
    source               <|im_start|>user\\nName the capital.<|im_end|>\\n<|im_start|>assistant
    decoder start token                                                                         \\n
    target                                                                                        Paris<|im_end|>

Source, start token and target, one after the other, are what the LLM itself would have read and written. Its chat
template is not run for each row. It renders a few conversations of marker words once, and what it writes around these
becomes a template of ours, which people can read. Then both render other conversations, and texts and tokens are
compared. If those with a system prompt or earlier turns differ, ours has no place for them, and a note says so.

One difference is wanted: if a row holds the characters `</s>`, the LLM's own tokenizer makes its end token of them;
here they stay text (encode.py).
"""

import copy
import json
import math
import re
import resource
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any, NamedTuple

import psutil
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError, excerpt, in_short
from diptych.data_prep.text_to_ids.encode import encode_sources, split_targets
from diptych.data_prep.text_to_ids.templates import Template, attach_template, golden_difference
from diptych.data_prep.text_to_ids.tokenizer_files import open_tokenizer

NAME = "donor"
SECONDS, MEMORY, LONGEST_CHAT = 5, 2**30, 1_000_000
"""For one conversation, rendered by the LLM's chat template."""
PADS = re.compile(r"<\|(finetune|reserved)[^|]*pad[^|]*\|>|<pad>|\[PAD\]|<\|pad\|>")
"""Tokens that LLMs without a padding token reserve for it."""
JINJA_MARKS = re.compile(r"\{[{%#]|[}%#]\}|\{\Z|\r")
"""What Jinja would read as its own, an opening brace before our `{{`, and line ends that it changes."""
SYSTEM, QUESTION, SECOND, ANSWER = "Qsystemq", "Quserq", "Qsecondq", "Qanswerq"


class Conversation(NamedTuple):
    system: str
    history: tuple[tuple[str, str], ...]
    instruction: str

    def messages(self, answer: str = "") -> list[dict[str, str]]:
        turns = [("system", self.system)] if self.system else []
        turns += [turn for asked, said in self.history for turn in (("user", asked), ("assistant", said))]
        turns += [("user", self.instruction), *([("assistant", answer)] if answer else [])]
        return [{"role": role, "content": content} for role, content in turns]


THREE_TURNS = (("Hello!", "Hi."), ("한국어?", "네."), ("x\ny", "z"))
CHECKED = (
    Conversation("", (), "Name the capital of France."),
    Conversation("", (), "{{ braces }} and\n\nlines, {% if %} {# x #} \\n and 한국어 🙂"),
    Conversation("Be brief.", (), "Why?"),
    Conversation("", (("Hello!", "Hi."),), "And now?"),
    Conversation("Be brief.\nAnd {{ kind }}.", (("Hello!", "Hi."),), "And now?"),
    Conversation("", THREE_TURNS, "And now?"),
    Conversation("Be kind.", THREE_TURNS, "And\nnow"),
)
"""Our template has to render these as the LLM's does."""
ANSWERS = ("Paris.", "네, 🙂", "It is\n  two {{ lines }}", "  x = 1\n")


@dataclass(frozen=True)
class DonorPrompt:
    tokenizer: PreTrainedTokenizerBase
    """A copy that adds no special tokens by itself and carries the template."""
    template: Template
    decoder_start_token_id: int
    notes: list[str]
    """Differences from the LLM, in sentences."""


@dataclass(frozen=True)
class ChatFrame:
    """What a chat template writes around texts.

    bos head                            QUESTION to_answer ANSWER to_question QUESTION after_user
    bos system_head SYSTEM after_system QUESTION after_user before_answer ANSWER after_answer
    """

    bos: str = ""
    head: str = ""
    """Before the first question, without a system prompt."""
    after_user: str = ""
    """After the last question: the generation prompt."""
    before_answer: str | None = ""
    """Between generation prompt and answer, in conversations that have one (Qwen3: an empty thought); None if answers
    in conversations do not begin with the generation prompt."""
    after_answer: str = ""
    system_head: str | None = None
    """None if it takes no system prompt."""
    after_system: str = ""
    is_system_last: bool = False
    """The system prompt stands before the last question, as in Mistral's template, and not before the first."""
    to_answer: str | None = None
    """None if it takes no earlier turns."""
    to_question: str = ""
    joint: str = "\n\n"
    """Between instruction and input."""
    trimmed: frozenset[str] = frozenset()
    """Which of "system", "user" and "assistant" lose the blanks around their texts."""

    def takes(self, conversation: Conversation) -> bool:
        takes_system = self.system_head is not None or not conversation.system
        return takes_system and (self.to_answer is not None or not conversation.history)

    def source(self, after_user: str) -> str:
        """The source side of our template."""
        turns = ""
        if self.to_answer is not None:
            turn = [self._value("turn[0]", "user"), _literal(self.to_answer)]
            turn += [self._value("turn[1]", "assistant"), _literal(self.to_question)]
            turns = f"{{% for turn in history %}}{''.join(turn)}{{% endfor %}}"
        if self.is_system_last:
            own = self.system_head.removeprefix(self.head)
            before = _literal(self.head) + turns + self._if_system(own, self.after_system)
        else:
            before = self._head_and_system() + turns
        return _whole(_literal(self.bos) + before + self._question() + _literal(after_user))

    def target(self, before_answer: str, closing: str) -> str:
        return _whole(_literal(before_answer) + self._value("output", "assistant") + _literal(closing))

    def _head_and_system(self) -> str:
        """If the system prompt has a turn of its own or is part of the first question, `head` is written once."""
        if self.system_head is None:
            return _literal(self.head)
        if self.after_system.endswith(self.head):
            return self._if_system(self.system_head, self.after_system.removesuffix(self.head)) + _literal(self.head)
        if self.system_head.startswith(self.head):
            return _literal(self.head) + self._if_system(self.system_head.removeprefix(self.head), self.after_system)
        return self._if_system(self.system_head, self.after_system, self.head)

    def _if_system(self, before: str, after: str, otherwise: str = "") -> str:
        written = _literal(before) + self._value("system", "system") + _literal(after)
        otherwise = f"{{% else %}}{_literal(otherwise)}" if otherwise else ""
        return f"{{% if system %}}{written}{otherwise}{{% endif %}}"

    def _question(self) -> str:
        if "user" not in self.trimmed:
            return f"{{{{ instruction }}}}{{% if input %}}{self.joint}{{{{ input }}}}{{% endif %}}"
        joined = self._value(f"(instruction ~ {json.dumps(self.joint)} ~ input)", "user")
        return f"{{% if input %}}{joined}{{% else %}}{self._value('instruction', 'user')}{{% endif %}}"

    def _value(self, name: str, role: str) -> str:
        return f"{{{{ {name}{'|trim' if role in self.trimmed else ''} }}}}"


def _literal(text: str) -> str:
    """As Jinja writes it: as it is, or as a string if Jinja would read something in it as its own."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if JINJA_MARKS.search(text) else text


def _whole(template: str) -> str:
    """Jinja drops a line end at the end of a template, but not one in a string."""
    return template[:-1] + '{{ "\\n" }}' if template.endswith("\n") else template


def donor_prompt(
    tokenizer: PreTrainedTokenizerBase, name: str, eos_token_ids: Sequence[int] = (), pad_token_id: int | None = None
) -> DonorPrompt:
    """`eos_token_ids` and `pad_token_id` are those of the LLM's configs, which may name more than its tokenizer.
    UserError where its prompts cannot be divided into a source and a start token, or its tokenizer, once saved, adds
    special tokens."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{name} has no tokenizer.json ({type(tokenizer).__name__}), and only such tokenizers can be kept. Write"
            f" one beside its files: transformers.convert_slow_tokenizer.convert_slow_tokenizer(tokenizer).save(…)"
        )
    notes: list[str] = []
    bare = copy.deepcopy(tokenizer)  # which adds no special tokens by itself; those of the prompt are in the template
    for setting in ("add_bos_token", "add_eos_token"):  # from which from_pretrained makes a post-processor
        setattr(bare, setting, False)
        bare.init_kwargs[setting] = False
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    if tokenizer.chat_template:
        with closing(_ChatTemplate(tokenizer, name)) as chat:
            start, template = _start_and_template(chat, bare, eos_token_ids, notes)
    else:
        frame = _base_frame(tokenizer, notes)
        _set_eos(bare, frame, eos_token_ids, name, notes)
        start, template = _base_start(bare, notes), Template(NAME, frame.source(""))
    if bare.pad_token is None:
        reserved = sorted(filter(PADS.fullmatch, bare.get_vocab()), key=bare.convert_tokens_to_ids)
        token = _token(bare, pad_token_id) or next(iter(reserved), None)
        bare.pad_token = token or bare.unk_token or bare.eos_token
        notes.append(f"The LLM's tokenizer has no padding token; {bare.pad_token} is it now.")
    attach_template(bare, template)
    _check_saved(bare, template, name)
    return DonorPrompt(bare, template, start, notes)


def _start_and_template(
    chat: "_ChatTemplate", bare: PreTrainedTokenizerBase, eos_token_ids: Sequence[int], notes: list[str]
) -> tuple[int, Template]:
    frame = _frame_of(chat, notes)
    end = _set_eos(bare, frame, eos_token_ids, chat.name, notes)
    start, shown = _divided(bare, frame, chat.name)
    template = Template(NAME, frame.source(shown), _matching_target(chat, bare, frame, end, notes))
    for conversation in filter(frame.takes, CHECKED):  # a note for the first one whose tokens are not the LLM's
        system, history, instruction = conversation
        theirs = chat.tokenizer(chat.render(conversation), add_special_tokens=False)["input_ids"]
        (source,) = encode_sources(bare, [template.render_source(instruction, "", history, system)])
        if [*source, start] != theirs:
            notes.append(f"Prompts are cut into other tokens than the LLM's, such as that of {instruction!r}.")
            break
    return start, template


# The frame


_TOKENIZER: list[PreTrainedTokenizerBase] = []
"""Of the process that renders."""


def _limit_memory(tokenizer: PreTrainedTokenizerBase) -> None:
    _TOKENIZER.append(tokenizer)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY,) * 2)


def _rendered(messages: list[dict[str, str]], variables: dict[str, Any]) -> str:
    """ValueError for whatever a template raises, since not all errors can be sent to another process."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used) + SECONDS, resource.RLIM_INFINITY))
    is_open = messages[-1]["role"] == "user"
    try:
        text = _TOKENIZER[0].apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open, **variables)
    except MemoryError:
        raise
    except BaseException as error:  # raise_exception() in a template, or any error of its code
        raise ValueError(in_short(error)) from None
    if len(text) > LONGEST_CHAT:
        raise MemoryError
    return text


@dataclass(frozen=True)
class _ChatTemplate:
    tokenizer: PreTrainedTokenizerBase
    name: str
    process: list[ProcessPoolExecutor] = field(default_factory=list)
    """One, from the first conversation on."""

    def render(self, conversation: Conversation, answer: str = "", **variables) -> str | None:
        """None if the template refuses this kind of conversation, which it does by any exception. Without an answer,
        the beginning of one is written."""
        try:
            return self.render_or_raise(conversation, answer, **variables)
        except UserError:
            raise
        except Exception:  # raise_exception() in a template, or any error of its code
            return None

    def render_or_raise(self, conversation: Conversation, answer: str = "", **variables) -> str:
        """In a process of its own: nothing else stops a template of loops in loops, or one that fills memory. It has
        SECONDS of processor time and MEMORY; UserError where they are not enough, ValueError with what a template
        raises."""
        if not self.process:
            self.process.append(ProcessPoolExecutor(1, get_context("fork"), _limit_memory, (self.tokenizer,)))
        try:
            return self.process[0].submit(_rendered, conversation.messages(answer), variables).result()
        except (BrokenProcessPool, MemoryError):
            self.close()
            raise self.refuse(
                f"takes more than {SECONDS} s, {MEMORY:,} bytes or {LONGEST_CHAT:,} characters"
            ) from None

    def close(self) -> None:
        while self.process:
            self.process.pop().shutdown()

    def between(self, conversation: Conversation, markers: Sequence[str], answer: str = "") -> list[str] | None:
        """What the text has before, between and behind the markers; None if they are not in it in this order, once
        each."""
        text = self.render(conversation, answer)
        if text is None or any(text.count(marker) != 1 for marker in markers):
            return None
        parts = re.split("|".join(markers), text)
        return parts if re.findall("|".join(markers), text) == list(markers) else None

    def trims(self, role: str) -> bool:
        """Whether texts of this role lose the blanks around them."""

        def rendered(text: str) -> str | None:
            system, answer = (text if role == it else "" for it in ("system", "assistant"))
            return self.render(Conversation(system, (), text if role == "user" else QUESTION), answer)

        bare = rendered("Qq")
        return bare is not None and rendered(" \nQq") == rendered("Qq \n") == bare

    def refuse(self, fault: str) -> UserError:
        return UserError(
            f"the chat template of {self.name} {fault}. Take it out (chat_template.jinja in that folder, or"
            f" chat_template in tokenizer_config.json), pair it as a base model, and give a template of yours to"
            f" `diptych prepare --template`."
        )


def _frame_of(chat: _ChatTemplate, notes: list[str]) -> ChatFrame:
    """The frame of a chat template, with a place for the kinds of texts that ours renders as the LLM's does."""
    full = _probed(chat, notes)
    no_system, no_history = {"system_head": None}, {"to_answer": None}
    for without in ({}, no_system, no_history, no_system | no_history):
        frame = replace(full, **without)
        faults = list(_differences(chat, frame))
        if not faults:
            break
    else:
        ours, theirs = faults[0]
        raise chat.refuse(
            f"cannot be written as a frame around texts: it gives {_end(theirs)}, and a frame gives {_end(ours)}"
        )
    for place, kind in (("system_head", "system prompts"), ("to_answer", "earlier turns")):
        if getattr(full, place) is None:
            notes.append(f"The chat template has no place for {kind}, and so ours has none.")
        elif getattr(frame, place) is None:
            notes.append(f"The chat template writes {kind} in a way of its own: ours has no place for them.")
    for question in (Conversation("", (), QUESTION), Conversation(SYSTEM, (), QUESTION)):
        if chat.render(question) and not chat.render(question, strftime_now="no function"):
            notes.append(f"The chat template of {chat.name} writes today's date; ours keeps that of this day.")
            break
    kinds = {"system": "system prompts", "user": "questions", "assistant": "answers"}
    if trimmed := [kinds[role] for role in kinds if role in frame.trimmed]:
        notes.append(f"Blanks around {', '.join(trimmed)} are lost, as in the chat template.")
    return frame


def _probed(chat: _ChatTemplate, notes: list[str]) -> ChatFrame:
    """What stands between the texts of conversations of each kind."""
    question = Conversation("", (), QUESTION)
    try:
        prompt = chat.render_or_raise(question)
    except UserError:
        raise
    except Exception as error:  # templates raise errors of any type
        raise chat.refuse(f"fails on a question: {excerpt(error)}") from error
    parts = chat.between(question, [QUESTION])
    if parts is None or not parts[1]:
        raise chat.refuse(f"does not render a question and the beginning of an answer, but {_end(prompt)}")
    head, after_user = parts
    answered = chat.between(question, [QUESTION, ANSWER], ANSWER)
    if answered is None or answered[0] != head:
        raise chat.refuse("does not render a question and its answer")
    before_answer = answered[1].removeprefix(after_user)
    if not answered[1].startswith(after_user):
        before_answer = None
        notes.append(
            f"The LLM's prompts end in {after_user!r}, and in its conversations answers stand behind {answered[1]!r}:"
            f" ours end as its prompts do."
        )
    bos = chat.tokenizer.bos_token or ""
    bos = bos if head.startswith(bos) else ""
    frame = ChatFrame(bos, head.removeprefix(bos), after_user, before_answer, answered[2])
    opened = chat.between(Conversation(SYSTEM, (), QUESTION), [SYSTEM, QUESTION])
    if opened is not None and opened[0].startswith(bos):
        frame = replace(frame, system_head=opened[0].removeprefix(bos), after_system=opened[1])
    turns = ((QUESTION, ANSWER),)
    history = chat.between(Conversation("", turns, SECOND), [QUESTION, ANSWER, SECOND])
    if history is not None and history[0] == head:
        frame = replace(frame, to_answer=history[1], to_question=history[2])
    last = chat.between(Conversation(SYSTEM, turns, SECOND), [QUESTION, ANSWER, SYSTEM, SECOND])
    is_system_last = last is not None and (frame.system_head or "").startswith(frame.head)
    trimmed = frozenset(filter(chat.trims, ("system", "user", "assistant")))
    return replace(frame, is_system_last=is_system_last, trimmed=trimmed)


def _base_frame(tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> ChatFrame:
    """Of a base model: its beginning of text, if it has one, then paragraphs."""
    notes.append(
        "There is no chat template: a prompt is the instruction and, in a new line, the input; a system prompt and"
        " earlier turns stand before it as paragraphs."
    )
    has_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = tokenizer.bos_token if has_bos else ""
    history = {"to_answer": "\n", "to_question": "\n\n"}
    return ChatFrame(bos, system_head="", after_system="\n\n", joint="\n", **history)


def _differences(chat: _ChatTemplate, frame: ChatFrame) -> Iterator[tuple[str, str]]:
    """Our text and theirs of each conversation that the frame has a place for, if they differ."""
    template = Template(NAME, frame.source(frame.after_user))
    for conversation in filter(frame.takes, CHECKED):
        ours = str(template.render_source(conversation.instruction, "", conversation.history, conversation.system))
        theirs = chat.render(conversation)
        if ours != theirs:
            yield ours, theirs or "an error"


def _end(text: str) -> str:
    return repr(text if len(text) <= 200 else f"… {text[-200:]}")


# The tokens


def _check_saved(tokenizer: PreTrainedTokenizerBase, template: Template, name: str) -> None:
    """UserError if the tokenizer differs once it is saved and loaded, or adds special tokens."""
    kind = f"the tokenizer of {name} ({type(tokenizer).__name__})"
    advice = "Save it as a PreTrainedTokenizerFast without a post-processor, and pair again."
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        try:
            again = open_tokenizer(folder)
        except UserError as error:
            raise UserError(f"{kind} cannot be loaded once it is saved: {error} {advice}") from error
    for text in ("a. 1", "한"):
        if again(text)["input_ids"] != tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise UserError(f"{kind} puts tokens around each text, which cannot be switched off. {advice}")
    saved, loaded = ((it.eos_token_id, it.pad_token_id, len(it)) for it in (tokenizer, again))
    difference = golden_difference(again, template)
    if saved != loaded:
        difference = f"end token, padding token and size were {saved} and are {loaded}"
    if difference:
        raise UserError(f"{kind} changes when it is saved: {difference}. {advice}")


def _token(tokenizer: PreTrainedTokenizerBase, token_id: int | None) -> str | None:
    """None for an id that has no token: configs may say -1, or name one beyond the vocabulary."""
    if token_id is None or not 0 <= token_id < len(tokenizer):
        return None
    return tokenizer.convert_ids_to_tokens(token_id)


def _set_eos(
    tokenizer: PreTrainedTokenizerBase, frame: ChatFrame, eos_token_ids: Sequence[int], name: str, notes: list[str]
) -> str:
    """Makes the token that ends the LLM's answers the end token. Returns what stands between an answer and it: if the
    LLM does not name its closing token as an end, that token is text, and the end token follows it."""
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


def _divided(tokenizer: PreTrainedTokenizerBase, frame: ChatFrame, name: str) -> tuple[int, str]:
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


def _source_ids(tokenizer: PreTrainedTokenizerBase, frame: ChatFrame, after_user: str) -> list[int]:
    (ids,) = encode_sources(tokenizer, [Template(NAME, frame.source(after_user)).render_source("Name it")])
    return ids


def _base_start(tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> int:
    """A line end if it is one token, else the token that texts begin with."""
    without, with_end = encode_sources(tokenizer, ["a", "a\n"])
    if with_end[:-1] == without and tokenizer.decode(with_end[-1:]) == "\n":
        notes.append("The decoder starts with a line end.")
        return with_end[-1]
    token = tokenizer.bos_token or tokenizer.eos_token
    notes.append(f"No token is a line end and nothing else, so the decoder starts with {token}.")
    return tokenizer.convert_tokens_to_ids(token)


def _matching_target(
    chat: _ChatTemplate, bare: PreTrainedTokenizerBase, frame: ChatFrame, closing: str, notes: list[str]
) -> str:
    """The target side that, behind the prompt, gives the tokens of the LLM's own conversation; a note if none does.

    A blank before an answer may be the one that tokenizers of words (▁Paris) put before each text themselves.
    """
    if frame.before_answer is None:
        return frame.target("", closing)
    asked = Conversation("", (), "Name it")
    theirs = [chat.tokenizer(chat.render(asked, it) or "", add_special_tokens=False)["input_ids"] for it in ANSWERS]
    prompt = _source_ids(bare, frame, frame.after_user)
    has_eos = bare.eos_token in frame.after_answer
    unlike = {}
    for before in dict.fromkeys((frame.before_answer, frame.before_answer.removeprefix(" "))):
        template = Template(NAME, "", frame.target(before, closing))
        labels = split_targets(bare, [template.render_target(answer) for answer in ANSWERS])
        ours = [[*prompt, *(it.ids() if has_eos else it.content)] for it in labels]
        pairs = zip(ANSWERS, ours, theirs, strict=True)
        unlike[before] = [answer for answer, own, their in pairs if own != their[: len(own)]]
    before = min(unlike, key=lambda it: len(unlike[it]))
    if unlike[before]:
        few = ", ".join(map(repr, unlike[before]))
        notes.append(f"Answers are cut into other tokens than the LLM's, such as {few}: it learns ours.")
    if before:
        notes.append(f"Targets begin with {before!r}, as the LLM's answers do in training.")
    return frame.target(before, closing)
