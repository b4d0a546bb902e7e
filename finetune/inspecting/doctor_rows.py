"""The rows that `diptych doctor` examines a model with: eight short ones of very uneven length, of the user's data.

    rows_from("my-rows.jsonl", tokenizer)  ->  Rows([{"input_ids": […], "labels": […], "origin": …}, …], "rows of …")
    eight_of(looked_at, tokens=64)         ->  eight of these, from the shortest target to the longest, 64 tokens each

They are uneven on purpose: among equally long rows a mean of micro-batch means equals the mean over tokens, so its
fault would not show.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.sources import open_sources
from diptych.data_prep.rows.records import Reject
from diptych.data_prep.rows.records import Row as RawRow
from diptych.data_prep.text_to_ids.encode import encode_sources, encode_targets
from diptych.data_prep.text_to_ids.templates import TEMPLATES, carried_template
from diptych.finetune.batches.padded_rows import open_splits
from diptych.finetune.model.families import embedding_rows

ROWS_LOOKED_AT = 10_000
"""Rows whose ids are checked; this takes a second or two."""
ROWS_COMPUTED = 8
"""One for each micro-batch."""
SOURCE_TOKENS = 64
TARGET_TOKENS = 32

SENTENCES = [
    ("Answer.", "", "Yes."),
    ("Translate English to French:", "Go.", "Va !"),
    ("Name the capital of Peru.", "", "Lima is the capital of Peru."),
    ("Add.", "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43", "The sum of these primes is 281."),
    ("Say it shorter.", "At this point in time it is the case that it rains, and it rains a lot.", "It pours."),
    ("Explain rain.", "", "Warm air rises and cools, its vapour gathers in drops, and heavy drops fall."),
    ("Count to twenty.", "", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20"),
    ("Why is the sky blue, and red in the evening?", "", "Air scatters blue light most. In the evening " * 2),
]

Row = dict[str, Any]


class Rows(NamedTuple):
    looked_at: list[Row]
    """`input_ids`, `labels`, and `origin`, the file or split and the row's number."""
    described: str
    """As in "rows of my-rows.jsonl"."""


def rows_from(data: str, tokenizer: PreTrainedTokenizerBase | None) -> Rows:
    """The first split (train if there is one) of a prepared folder; or the rows of a file, as the tokenizer encodes
    them."""
    place = Path(data)
    if place.is_dir():
        splits = open_splits(place)
        name = next((name for name, split in splits.items() if len(split)), None)
        if name is None:
            raise UserError(f"{place} has no rows; it has the splits {', '.join(splits)}. Prepare it again.")
        looked_at = splits[name].select(range(min(len(splits[name]), ROWS_LOOKED_AT)))
        columns = enumerate(looked_at.select_columns(["input_ids", "labels"]))
        return Rows(
            [row | {"origin": f"{name} row {number}"} for number, row in columns], f"rows of {data}, split {name}"
        )
    if tokenizer is None:
        raise UserError(
            f"{data} holds text, and the checkpoint has no tokenizer to encode it. Save one in its folder."
        )
    rows = (row for source in open_sources([data]) for chunk in source.chunks() for row in chunk.rows())
    texts = [_texts_of(row) for row in islice(rows, ROWS_LOOKED_AT)]
    if not texts:
        raise UserError(f"{data} has no rows. Name a file with one row or more.")
    without_output = [origin for *_, output, origin in texts if not output.strip()]
    if len(without_output) == len(texts):
        raise UserError(
            f"{data}: the output is empty in each of {len(texts):,} rows, the first being {without_output[0]}, and "
            f"from such rows nothing is learned. Write what the model is to answer into output."
        )
    described = f"rows of {data}"
    if without_output:
        described += f" ({len(without_output):,} without output left out, the first {without_output[0]})"
    return Rows(encoded_rows([row for row in texts if row[2].strip()], tokenizer), described)


def encoded_rows(texts: Sequence[tuple[str, str, str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """(instruction, input, output, origin) of each row, in the tokenizer's own template, or Alpaca's."""
    template = carried_template(tokenizer, check=False) or TEMPLATES["alpaca"]  # a check compares its golden rows
    sources = encode_sources(tokenizer, [template.render_source(told, given) for told, given, _, _ in texts])
    rendered = [template.render_target(output) for _, _, output, _ in texts]
    targets = encode_targets(tokenizer, rendered, decoder_prefix=template.decoder_prefix)
    return [
        {"input_ids": source, "labels": target, "origin": origin}
        for source, target, (*_, origin) in zip(sources, targets, texts, strict=True)
    ]


def built_in_rows(tokenizer: PreTrainedTokenizerBase) -> Rows:
    texts = [(*sentence, f"sentence {number}") for number, sentence in enumerate(SENTENCES, start=1)]
    return Rows(encoded_rows(texts, tokenizer), "built-in sentences")


def random_rows(model: PreTrainedModel) -> Rows:
    """For a checkpoint without a tokenizer: random ids of ordinary tokens; each side ends in eos."""
    known = model.generation_config
    ends = known.eos_token_id if isinstance(known.eos_token_id, list) else [known.eos_token_id]
    special = {known.pad_token_id, known.bos_token_id, known.decoder_start_token_id, *ends}
    words_of = [[token for token in range(rows) if token not in special] for rows in embedding_rows(model)]
    generator = torch.Generator().manual_seed(0)

    def ids(words: list[int], tokens: int) -> list[int]:
        chosen = torch.randint(len(words), (tokens,), generator=generator)
        return [words[place] for place in chosen] + [ends[0] or 0]

    lengths = zip((5, 40, 3, 12, 30, 8, 55, 20), (1, 2, 4, 6, 9, 14, 20, 30), strict=True)
    source, target = words_of
    rows = [{"input_ids": ids(source, s), "labels": ids(target, t), "origin": f"random row {t}"} for s, t in lengths]
    return Rows(rows, "rows of random ids (the checkpoint has no tokenizer)")


def eight_of(looked_at: Sequence[Row], tokens: int | None) -> list[Row]:
    """Evenly from the shortest target to the longest, each cut to `tokens` positions, its last token kept."""
    in_order = sorted(looked_at, key=lambda row: len(row["labels"]))
    last, found = len(in_order) - 1, []
    for place in range(ROWS_COMPUTED):
        row = in_order[round(place * last / (ROWS_COMPUTED - 1))]
        found.append({})
        for column, limit in (("input_ids", SOURCE_TOKENS), ("labels", TARGET_TOKENS)):
            ids, most = row[column], min(limit, tokens or limit)
            found[-1][column] = ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]
    return found


def _texts_of(row: RawRow | Reject) -> tuple[str, str, str, str]:
    fault = "a row is an object with the texts instruction (or input) and output"
    if isinstance(row, Reject):
        fault = row.reason.rstrip(".")
    else:
        texts = [
            "" if row.fields.get(name) is None else row.fields[name] for name in ("instruction", "input", "output")
        ]
        if all(isinstance(text, str) for text in texts) and (texts[0] or texts[1]) and "output" in row.fields:
            return (*texts, str(row.origin))
    raise UserError(
        f"{row.origin}: {fault}. Correct the row, or let `diptych prepare` leave it out, and name its folder."
    )
