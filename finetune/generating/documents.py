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
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import regex

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Languages
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
    reduces: bool = False
    """Whether the outputs of the pieces are only the next text."""
    error: str = ""
    """Why the prompt cannot be asked."""


class Answered(NamedTuple):
    outputs: list[Output]
    """`num_return_sequences` of them; n-th of the joined ones is of the n-th outputs of the pieces."""
    rounds: int = 1
    """How often the model read the text; more than 1 for `reduce` only."""


class Documents:
    def __init__(self, prompter: Prompter, engine: TorchEngine, long: str):
        self.prompter, self.engine, self.long = prompter, engine, long
        self.unlimited = prompter._replace(max_source_tokens=None)
        self.given: dict[Languages, list[int]] = {}
        codes = codes_of(prompter.tokenizer)
        self.only_translates = codes.layout != "words"
        if long == "reduce" and prompter.max_source_tokens is None:
            raise UserError("--long reduce needs a limit, and this model reads sources of any length. Give "
                            "--max_source_tokens, the longest source that it was trained with.")  # fmt: skip

    def encode(
        self, prompts: Sequence[Prompt], rendered: Sequence[tuple[str, Languages]] | None = None
    ) -> list[Document]:
        """Cuts and encodes prompts that `Prompter.render` takes, or has `rendered` already.

        Raises:
            UserError: a text has to be cut, and its language is not given or has no splitter.
        """
        rendered = rendered or [self.prompter.render(prompt) for prompt in prompts]
        languages = [of_prompt for _, of_prompt in rendered]
        ids, was_cut = self.prompter.encode([text for text, _ in rendered], languages)
        found = []
        for prompt, (source, it), of_prompt, over in zip(prompts, rendered, ids, was_cut, strict=True):
            translates = self.long == "split" and (self.only_translates or bool(it.direction))
            field = "input" if prompt.input else "instruction" if source == prompt.instruction else ""
            if self.long == "cut" or not (over or (translates and field)):
                whole = [EncodedPrompt(of_prompt, self._given(it))]
                found.append(Document(prompt, field, WHOLE, whole, is_cut_off=over))
                continue
            try:
                found.append(self._cut(prompt, field, it, translates))
            except NoSplitter as error:
                place = f"prompt {len(found) + 1} of {len(prompts)}: " if len(prompts) > 1 else ""
                raise UserError(f"{place}{error}") from None
            except UserError as error:
                found.append(Document(prompt, field, WHOLE, [], error=str(error)))
        return found

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

        def encoded(texts: list[str]) -> list[list[int]]:
            sources = [self.prompter.render(prompt._replace(**{field: text.strip()}))[0] for text in texts]
            return self.unlimited.encode(sources, [languages] * len(texts))[0]

        def fits(piece: str) -> bool:
            return limit is None or not piece.strip() or len(encoded([piece])[0]) <= limit

        try:
            if translates:
                pieces = within(lines_and_sentences(text, languages.source), fits)
            else:
                pieces = filled(text, languages.source, fits)
        except NoRoom:
            raise UserError(
                f"the prompt without its text takes all of the {limit} tokens that are read. Shorten the rest of it, "
                "or raise max_source_tokens."
            ) from None
        given = self._given(languages)
        prompts = [EncodedPrompt(ids, given) for ids in encoded(pieces.texts)]
        if reduces := self.long == "reduce":
            pieces = pieces._replace(gaps=["", *["\n"] * (len(pieces.texts) - 1), ""])
        return Document(prompt, field, pieces, prompts, reduces=reduces)

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
        for place, ((output,), _) in reduced.items():
            prompt, field = documents[place].prompt, documents[place].field
            if 0 < len(output.text) <= SHRINKS * len(getattr(prompt, field)):
                shorter[place] = prompt._replace(**{field: output.text})
            else:
                found[place] = Answered([output._replace(finished=False)] * each)
        answers = self.generate(self.encode(list(shorter.values())), settings, seed, bar)
        for place, (outputs, rounds) in zip(shorter, answers, strict=True):
            found[place] = Answered(outputs, rounds + 1)
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
        each, rest, found = settings.num_return_sequences, iter(outputs), {}
        for place in places:
            of_pieces = [[next(rest) for _ in range(each)] for _ in documents[place].prompts]
            columns = [[of_piece[number] for of_piece in of_pieces] for number in range(each)]
            found[place] = Answered([joined(documents[place].pieces, column) for column in columns])
        return found


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
