"""Prompts of a server that were cut into pieces (generating/documents.py): a job for each piece, one answer for all.

    document, jobs = asked_as_pieces(served, prompt)
    async for place, event in document_events(documents, events, streams): …      Ended([Answer("가.  멈춰.", …)])

A document whose pieces are joined, or whose outputs are checked, is answered when all of it is generated.
"""

from collections.abc import AsyncIterator, Sequence

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.generating.documents import WHOLE, Document, Promise, answered
from diptych.finetune.inference.engine import EncodedPrompt
from diptych.finetune.inference.outputs import Output
from diptych.finetune.inference.prompts import Prompt
from diptych.finetune.serving.request_batches import Answer, Ended, Piece
from diptych.finetune.serving.served_model import Encoded, ServedModel

MOST_CHARACTERS = 200_000
"""Of a prompt that is cut: finding its sentences and their tokens takes seconds beyond that."""


def asked_as_pieces(served: ServedModel, prompt: Prompt) -> tuple[Document, list[Encoded]]:
    """UserError as of `ServedModel.encode`, for a text without a splitter, or for one of too many characters."""
    document = None
    if served.documents is not None:
        characters = len(prompt.instruction) + len(prompt.input)
        if characters > MOST_CHARACTERS:
            raise UserError(f"the prompt has {characters} characters, and at most {MOST_CHARACTERS} are read.")
        (document,) = served.documents.encode([prompt])
        if document.error:
            raise UserError(document.error)
    if document is None or document.is_cut_off or not document.prompts:
        encoded = served.encode(prompt)
        whole = [EncodedPrompt(encoded.source_ids, list(encoded.given))]
        return Document(prompt, "", WHOLE, whole, promises=[Promise()]), [encoded]
    return document, [Encoded(ids, len(ids), given) for ids, given in document.prompts]


def is_plain(document: Document) -> bool:
    """Whether the answer to its only piece is that of the document, as it is written."""
    return document.pieces == WHOLE and not any(map(any, document.promises))


async def document_events(
    documents: Sequence[Document], events: AsyncIterator[tuple[int, Piece | Ended]], streams: bool
) -> AsyncIterator[tuple[int, Piece | Ended]]:
    """(index of the document, event), of the (index of the job, event). Streams get the text of a joined document as
    one piece."""
    place_of = [(place, part) for place, it in enumerate(documents) for part in range(len(it.prompts))]
    ended: dict[int, dict[int, list[Answer]]] = {}
    async for job, event in events:
        place, part = place_of[job]
        if is_plain(documents[place]):
            yield place, event
        elif isinstance(event, Ended):
            of_parts = ended.setdefault(place, {})
            of_parts[part] = event.answers
            if len(of_parts) == len(documents[place].prompts):
                answers = joined_answers(documents[place], [of_parts[it] for it in sorted(of_parts)])
                for index, answer in enumerate(answers if streams else ()):
                    yield place, Piece(index, answer.text)
                yield place, Ended(answers)


def joined_answers(document: Document, of_parts: Sequence[Sequence[Answer]]) -> list[Answer]:
    each = len(of_parts[0])
    outputs = [Output(it.text, it.finished, it.ids) for answers in of_parts for it in answers]
    ((texts, missed, lost, _),) = answered([document], outputs, each)
    facts = [
        {"source_pieces": len(of_parts), "terms_missed": missed[it], "placeholders_lost": lost[it]}
        for it in range(each)
    ]
    return [Answer(it.text, it.finished, it.ids, (), fact) for it, fact in zip(texts, facts, strict=True)]
