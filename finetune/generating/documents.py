"""Prompts whose text is longer than the model reads: cut into pieces, generated in batches, joined. For any engine.

    documents = Documents(prompter, engine, "split")
    asked = documents.encode([Prompt("", "It rains.\\n\\n- Go.  Stop.", languages=Languages("en", "ko"))])
    asked[0].pieces.texts                                   ["It rains.", "Go.", "Stop."]
    documents.generate(asked, settings, seed=0)[0].outputs  [Output("비가 온다.\\n\\n- 가.  멈춰.", finished=True, …)]

`cut`      every prompt as it is; what is over the limit is cut off.
`split`    translations are cut into their sentences, because a model that learned sentences drops some of a paragraph;
           other texts only if they are over the limit, into as few pieces as fit. Outputs are joined with the white
           space, line breaks and list marks of the source.
`reduce`   for summaries. A text over the limit is cut into as few pieces as fit; their outputs, joined by line breaks,
           are the next text, until it fits, and the output of that is the answer.

Only the input is cut, or the instruction if the prompt is nothing else; each piece has the same rest of the prompt.
Into the same text, terms and placeholders are written (data_prep/rows/terms.py), and what came back is checked.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import regex

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.rows.terms import Term, Terms, masked, missing, read_terms, unmasked, with_marks
from diptych.data_prep.text_to_ids.languages import codes_of
from diptych.data_prep.text_to_ids.sentences import NoRoom, NoSplitter, Pieces, filled, lines_and_sentences, within
from diptych.finetune.inference.engine import EncodedPrompt, TorchEngine
from diptych.finetune.inference.generate_settings import GenerateSettings
from diptych.finetune.inference.outputs import GenerationBar, Output
from diptych.finetune.inference.prompts import Prompt, Prompter
from diptych.finetune.inference.target_tokens import given_tokens

WITHOUT_BLANKS = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\u3000-\u303f\uff00-\uffef]"
)
"""Letters and marks of scripts that put no blank between sentences."""


WHOLE = Pieces(["", ""], [""])
"""The pieces of a prompt that is not cut."""
SHRINKS = 0.9
"""Each round of `reduce` makes a text at least so much shorter, or is the last: the joined outputs are the answer, and
count as not finished."""


class Promise(NamedTuple):
    """What the output of a piece must have."""

    terms: Sequence[Term] = ()
    values: Sequence[str] = ()
    """Of its placeholders, in order."""


class Document(NamedTuple):
    """A prompt as it is asked."""

    prompt: Prompt
    field: str
    """That is cut; "" if none could be."""
    pieces: Pieces
    prompts: list[EncodedPrompt]
    """Of each piece."""
    is_cut_off: bool = False
    """Whether the end of the prompt is missing, which only `cut` does."""
    promises: Sequence[Promise] = ()
    """Of each piece."""
    reduces: bool = False
    """Whether the outputs of the pieces are only the next text."""
    error: str = ""
    """Why the prompt cannot be asked."""


class Answered(NamedTuple):
    outputs: list[Output]
    """`num_return_sequences` of them; n-th of the joined ones is of the n-th outputs of the pieces."""
    missed: list[list[str]]
    """Terms that each output should have and has not."""
    lost: list[list[str]]
    """Values of placeholders that did not come back exactly once in each output."""
    rounds: int = 1
    """How often the model read the text; more than 1 for `reduce` only."""


class Documents:
    def __init__(
        self,
        prompter: Prompter,
        engine: TorchEngine,
        long: str,
        terms: Terms | None = None,
        placeholders: bool = False,
    ):
        self.prompter, self.engine, self.long = prompter, engine, long
        self.terms, self.placeholders = terms, placeholders
        self.unlimited = prompter._replace(max_source_tokens=None)
        self.given: dict[Languages, list[int]] = {}
        codes = codes_of(prompter.tokenizer)
        self.only_translates = codes.layout != "words"
        if long == "reduce" and prompter.max_source_tokens is None:
            raise UserError("--long reduce needs a limit, and this model reads sources of any length. Give "
                            "--max_source_tokens, the longest source that it was trained with.")  # fmt: skip

    def encode(
        self,
        prompts: Sequence[Prompt],
        rendered: Sequence[tuple[str, Languages]] | None = None,
        places: Sequence[str] = (),
    ) -> list[Document]:
        """Cuts and encodes prompts that `Prompter.render` takes, or has `rendered` already. `places` says where each
        is from.

        Raises:
            UserError: a text has to be cut, and its language is not given or has no splitter.
        """
        rendered = rendered or [self.prompter.render(prompt) for prompt in prompts]
        languages = [of_prompt for _, of_prompt in rendered]
        fields = [
            "input" if prompt.input else "instruction" if source == prompt.instruction else ""
            for prompt, (source, _) in zip(prompts, rendered, strict=True)
        ]
        written = [self._inline(*it) for it in zip(prompts, fields, rendered, strict=True)]
        ids, was_cut = self.prompter.encode([text for text, _ in written], languages)
        found = []
        for prompt, field, it, of_prompt, over, (_, promise) in zip(
            prompts, fields, languages, ids, was_cut, written, strict=True
        ):
            translates = self.long == "split" and (self.only_translates or bool(it.direction))
            if self.long == "cut" or not (over or (translates and field)):
                whole = [EncodedPrompt(of_prompt, self._given(it))]
                found.append(Document(prompt, field, WHOLE, whole, over, [promise]))
                continue
            try:
                found.append(self._cut(prompt, field, it, translates))
            except NoSplitter as error:
                number = len(found)
                place = f"prompt {number + 1} of {len(prompts)}: " if len(prompts) > 1 else ""
                raise UserError(f"{f'{places[number]}: ' if places else place}{error}") from None
            except UserError as error:
                found.append(Document(prompt, field, WHOLE, [], error=str(error)))
        return found

    def _inline(self, prompt: Prompt, field: str, rendered: tuple[str, Languages]) -> tuple[str, Promise]:
        """The source text of a prompt with terms and placeholders in the text of `field`, and what they promise."""
        if not field or (self.terms is None and not self.placeholders):
            return rendered[0], Promise()
        text = getattr(prompt, field)
        text, values = masked(text) if self.placeholders else (text, [])
        terms = self.terms.found(text, rendered[1]) if self.terms else []
        return self.prompter.render(prompt._replace(**{field: with_marks(text, terms)}))[0], Promise(terms, values)

    def _given(self, languages: Languages) -> list[int]:
        if languages not in self.given:
            self.given[languages] = given_tokens(self.engine, languages)
        return self.given[languages]

    def _cut(self, prompt: Prompt, field: str, languages: Languages, translates: bool) -> Document:
        if not field:
            raise UserError(
                "the prompt is over the limit and has no input, which alone is cut. Put the text that the instruction "
                "is about into 'input'."
            )
        text, limit = getattr(prompt, field), self.prompter.max_source_tokens
        known: dict[str, tuple[list[int], Promise]] = {}

        def encode(texts: list[str]) -> None:  # together, which is ten times as fast as one by one
            new = [text for text in dict.fromkeys(texts) if text not in known]
            asked = [prompt._replace(**{field: text}) for text in new]
            written = [self._inline(it, field, self.prompter.render(it)) for it in asked]
            ids, _ = self.unlimited.encode([source for source, _ in written], [languages] * len(new))
            known.update(zip(new, zip(ids, [promise for _, promise in written], strict=True), strict=True))

        def fits(piece: str) -> bool:
            piece = piece.strip()
            if limit is None or not piece:
                return True
            encode([piece])
            return len(known[piece][0]) <= limit

        try:
            if translates:
                pieces = lines_and_sentences(text, languages.source)
                encode(pieces.texts)
                pieces = within(pieces, fits)
            else:
                pieces = filled(text, languages.source, fits)
        except NoRoom:
            raise UserError(
                f"the prompt without its text takes all of the {limit} tokens that are read. Shorten the rest of it, "
                "or raise max_source_tokens."
            ) from None
        given = self._given(languages)
        encode(pieces.texts)
        prompts = [EncodedPrompt(known[piece][0], given) for piece in pieces.texts]
        promises = [known[piece][1] for piece in pieces.texts]
        if reduces := self.long == "reduce":
            pieces = pieces._replace(gaps=["", *["\n"] * (len(pieces.texts) - 1), ""])
        return Document(prompt, field, pieces, prompts, False, promises, reduces)

    def generate(
        self, documents: Sequence[Document], settings: GenerateSettings, seed: int, bar: GenerationBar | None = None
    ) -> list[Answered]:
        """The answer of each document. The pieces of all are generated together, in batches of similar length."""
        rest = [place for place, document in enumerate(documents) if not document.reduces]
        found = self._round(documents, rest, settings, seed, bar)
        if len(rest) == len(documents):
            return [found[place] for place in rest]
        each, shorter = settings.num_return_sequences, {}
        one = replace(settings, num_return_sequences=1, scores=False)
        reduced = self._round(documents, sorted(set(range(len(documents))) - set(rest)), one, seed)
        for place, answer in reduced.items():
            (output,), (prompt, field, *_) = answer.outputs, documents[place]
            if 0 < len(output.text) <= SHRINKS * len(getattr(prompt, field)):
                shorter[place] = prompt._replace(**{field: output.text})
            else:
                stuck = [output._replace(finished=False)], answer.missed, answer.lost
                found[place] = Answered(*(it * each for it in stuck))
        answers = self.generate(self.encode(list(shorter.values())), settings, seed, bar)
        for place, answer in zip(shorter, answers, strict=True):
            found[place] = answer._replace(rounds=answer.rounds + 1)
        return [found[place] for place in range(len(documents))]

    def _round(
        self,
        documents: Sequence[Document],
        places: list[int],
        settings: GenerateSettings,
        seed: int,
        bar: GenerationBar | None = None,
    ) -> dict[int, Answered]:
        """Of the documents at these places, each piece read once."""
        prompts = [prompt for place in places for prompt in documents[place].prompts]
        is_bar_of_rows = bar is not None and len(prompts) != len(places)
        outputs = self.engine.generate(prompts, settings, seed, None if is_bar_of_rows else bar) if prompts else []
        if is_bar_of_rows:
            bar.advance(len(places), outputs)
        answers = answered([documents[place] for place in places], outputs, settings.num_return_sequences)
        return dict(zip(places, answers, strict=True))


def answered(documents: Sequence[Document], outputs: Sequence[Output], each: int = 1) -> list[Answered]:
    """From the outputs of all pieces, `each` of one piece, the answer of each document."""
    rest, found = iter(outputs), []
    for document in documents:
        kept = [[checked(next(rest), promise) for _ in range(each)] for promise in document.promises]
        columns = [[of_piece[number] for of_piece in kept] for number in range(each)]
        found.append(
            Answered(
                [joined(document.pieces, [output for output, _, _ in column]) for column in columns],
                [[term for _, missed, _ in column for term in missed] for column in columns],
                [[value for _, _, lost in column for value in lost] for column in columns],
            )
        )
    return found


def checked(output: Output, promise: Promise) -> tuple[Output, list[str], list[str]]:
    """The output with values in place of placeholders, the terms that it misses, and the values that it lost."""
    text, lost = unmasked(output.text, promise.values) if promise.values else (output.text, [])
    return output._replace(text=text), missing(promise.terms, text), lost


def joined(pieces: Pieces, outputs: Sequence[Output]) -> Output:
    """One output of those of the pieces: their texts between the gaps, their tokens one after the other, the sum of
    their log-probabilities. It is finished if all are."""
    if pieces == WHOLE:
        return outputs[0]
    texts = [output.text.strip() for output in outputs]
    seams = [
        gap or seam(*pair) for gap, pair in zip(pieces.gaps[1:-1], zip(texts, texts[1:], strict=False), strict=True)
    ]
    parts = [part for pair in zip(texts, [*seams, pieces.gaps[-1]], strict=True) for part in pair] if texts else []
    nats = [output.log_probability for output in outputs]
    return Output(
        pieces.gaps[0] + "".join(parts),
        all(output.finished for output in outputs),
        tuple(token for output in outputs for token in output.ids),
        None if None in nats else math.fsum(nats),
        None if None in nats else min((output.lowest_log_probability for output in outputs), default=0.0),
        tuple(part for output in outputs for part in output.unread or ()),
    )


def seam(before: str, after: str) -> str:
    """What stands between two outputs whose sources had nothing between them: a blank, unless there is nothing on one
    side, or a script that writes none."""
    is_bare = not before or not after or WITHOUT_BLANKS.match(before[-1]) or WITHOUT_BLANKS.match(after[0])
    return "" if is_bare else " "


def counts_of(documents: Iterable[Document]) -> dict[str, int]:
    """What a report says of documents that were cut."""
    cut = [document for document in documents if document.pieces != WHOLE]
    return {
        "cut into pieces": sum(len(document.prompts) > 1 for document in cut),
        "pieces in all": sum(len(document.prompts) for document in cut),
        "sentences over the limit, cut inside": sum(document.pieces.cut_sentences for document in cut),
    }


def documents_for(settings: GenerateSettings, prompter: Prompter, engine: TorchEngine) -> Documents:
    terms = read_terms(settings.terms) if settings.terms else None
    return Documents(prompter, engine, settings.long, terms, settings.placeholders)
