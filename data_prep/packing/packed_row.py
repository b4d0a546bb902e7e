"""Several examples as the arrays of one row.

    input_ids             12  7  9  1 |  5  8  1 |  0      labels               31 40  1 | 22  1 | -100
    segment_ids            1  1  1  1 |  2  2  2 |  0      decoder_input_ids     0 31 40 |  0 22 |    0
    position_ids           0  1  2  3 |  0  1  2 |  0      decoder_segment_ids   1  1  1 |  2  2 |    0
                                                           decoder_position_ids  0  1  2 |  0  1 |    0

Segment 0 is padding, and padding stands at the end. Decoder segment k reads encoder segment k. Each segment of
`decoder_input_ids` begins with the decoder's start token: a plain shift to the right would put the last label of one
example before the first of the next. Where sources are shared, equal `input_ids` stand once, and `cross_segment_ids`
say which of them a target reads:

    input_ids             12  7  9  1 |  0  0  0  0      labels               31 40  1 | 22  1 | -100
    segment_ids            1  1  1  1 |  0  0  0  0      decoder_segment_ids   1  1  1 |  2  2 |    0
                                                         cross_segment_ids     1  1  1 |  1  1 |    0

With pairs of answers, every example is two decoder segments, 2k - 1 (`labels`, the chosen answer) and 2k
(`other_labels`, the rejected one), that read the same source; sources are shared. `marks` tell them apart:

    input_ids             12  7  9  1 |  5  8  1 |  0      labels               31 40  1 | 22  1 | 50  1 | 61  1 | -100
    segment_ids            1  1  1  1 |  2  2  2 |  0      decoder_segment_ids   1  1  1 |  2  2 |  3  3 |  4  4 |    0
                                                           cross_segment_ids     1  1  1 |  1  1 |  2  2 |  2  2 |    0
                                                           marks                 1  1  1 | -1 -1 |  1  1 | -1 -1 |    0

With marked answers, segment 2k - 1 has marks of 1 if the answer is liked and -1 if not; segment 2k is the answer to
another source (`other_labels`), and its marks are 0.

Names are those of seqio. S source tokens, T target tokens of a row.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diptych.data_prep.rows.records import IGNORE_INDEX

SOURCE_COLUMNS = ("input_ids", "segment_ids", "position_ids")
"""(S,)"""
TARGET_COLUMNS = ("labels", "decoder_input_ids", "decoder_segment_ids", "decoder_position_ids")
"""(T,)"""
PACKED_COLUMNS = SOURCE_COLUMNS + TARGET_COLUMNS
SHARED_COLUMN = "cross_segment_ids"
"""(T,), one column more where sources are shared."""
MARKS_COLUMN = "marks"
"""(T,), one more in data of preferences."""

MARKS_COLUMN = "marks"
"""(T,), one column more where rows have preferences."""


class Budget(NamedTuple):
    """How many tokens fit into one row."""

    source_tokens: int
    target_tokens: int


def assemble_row(
    examples: Sequence[Mapping[str, Any]],
    budget: Budget,
    pad_token_id: int,
    decoder_start_token_id: int,
    share_sources: bool = False,
) -> dict[str, np.ndarray]:
    """The examples of one row, each with `input_ids` and `labels`, as the int32 arrays shown above. An example may
    have a `decoder_start` of its own. All or none have a `mark`; both answers of an example of preferences are given,
    one after the other."""
    sources = [np.asarray(example["input_ids"], dtype=np.int32) for example in examples]
    targets = [np.asarray(example["labels"], dtype=np.int32) for example in examples]
    starts = np.array([example.get("decoder_start", decoder_start_token_id) for example in examples])
    marks = np.array([example.get("mark", 0) for example in examples])
    reads = np.arange(1, len(sources) + 1)
    if share_sources:
        segment_of: dict[bytes, int] = {}
        reads = np.array([segment_of.setdefault(source.tobytes(), len(segment_of) + 1) for source in sources])
        sources = [np.frombuffer(source, dtype=np.int32) for source in segment_of]
        order = np.argsort(reads, kind="stable")  # so that targets of one source stand next to each other
        targets, reads, starts, marks = [targets[place] for place in order], reads[order], starts[order], marks[order]
    source_lengths, target_lengths = [len(source) for source in sources], [len(target) for target in targets]
    assert sum(source_lengths) <= budget.source_tokens and sum(target_lengths) <= budget.target_tokens, budget

    labels = np.concatenate(targets)
    decoder_input_ids = np.concatenate([starts[:1], labels[:-1]])
    decoder_position_ids = _positions(target_lengths)
    decoder_input_ids[decoder_position_ids == 0] = starts
    columns = {
        "input_ids": (np.concatenate(sources), pad_token_id),
        "segment_ids": (np.repeat(np.arange(1, len(sources) + 1), source_lengths), 0),
        "position_ids": (_positions(source_lengths), 0),
        "labels": (labels, IGNORE_INDEX),
        "decoder_input_ids": (decoder_input_ids, pad_token_id),
        "decoder_segment_ids": (np.repeat(np.arange(1, len(targets) + 1), target_lengths), 0),
        "decoder_position_ids": (decoder_position_ids, 0),
    }
    if share_sources:
        columns[SHARED_COLUMN] = (np.repeat(reads, target_lengths), 0)
    if "mark" in examples[0]:
        columns[MARKS_COLUMN] = (np.repeat(marks, target_lengths), 0)
    row = {}
    for name, (values, padding) in columns.items():
        row[name] = np.full(budget[name not in SOURCE_COLUMNS], padding, dtype=np.int32)
        row[name][: len(values)] = values
    return row


def _positions(lengths: Sequence[int]) -> np.ndarray:
    """[4, 3] → 0 1 2 3 0 1 2"""
    starts = np.cumsum(lengths) - lengths
    return np.arange(sum(lengths)) - np.repeat(starts, lengths)


def repeated_start(
    first_labels: np.ndarray, decoder_start_token_id: int, language_starts: Collection[int] = ()
) -> np.ndarray:
    """(examples,) of bool: whether the first label repeats the token that the decoder starts with, and is to be left
    out.

    Gemma's tokenizers put bos before every text, and T5Gemma's decoder starts with bos: trained on both, the model
    would learn to write it twice. A tokenizer does it always or never, so the first example decides. A row whose first
    label is one of `language_starts` starts with that one (mBART-cc25).
    """
    first_labels = np.asarray(first_labels)
    repeats = first_labels == decoder_start_token_id
    return (repeats & repeats[:1]) | np.isin(first_labels, list(language_starts))
