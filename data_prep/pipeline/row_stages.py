"""What happens to each row, wherever it runs: a chunk of rows in, a batch of examples and the rejects out.

    Chunk ─ convert, check, filter, render, encode ─▶ Batch(examples: an Arrow record batch, rejects, counts)

    source, target          the rendered texts          instruction, input    as the data has them
    origin                  "rows.jsonl:7"              source_number         which source it came from
    raw                     the row as it was read, for the case that it is left out later
    input_ids, labels       token ids, cut to the limits if so told           source_tokens, target_tokens  before that
    source_key, target_key  64 bits of each rendered text: who repeats whom, to the letter and in the same language
    source_language, target_language   codes, as the tokenizer has them; "" where there are none
    input_key, output_key   64 bits of what splits.py compares: who may be in which split; and
    row_key                 of the whole source, as it compares texts
    signature               MinHash of source and target, where near duplicates are sought

Nothing here knows of other rows, files or processes: `Stages` is plain data that can be sent to a worker, and the same
chunk gives the same batch on one core, in a pool, or in another engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy
import pyarrow
import xxhash
from transformers import PreTrainedTokenizerBase

from diptych.data_prep.cleaning.duplicates import Shingles, compared_text, exact_key, signatures
from diptych.data_prep.cleaning.filters import is_composed, script_of
from diptych.data_prep.cleaning.sensitive import find_in_record, masked
from diptych.data_prep.cleaning.splits import record_keys, text_key
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.reading.sources import Chunk
from diptych.data_prep.rows.convert_rows import Converter
from diptych.data_prep.rows.language_names import UnknownLanguage
from diptych.data_prep.rows.records import RAW_CHARACTERS_KEPT, Languages, Origin, Record, Reject, Row, Tokenised
from diptych.data_prep.text_to_ids.encode import (
    Encoding,
    fit,
    shortened,
    spelled_added_tokens,
    split_sources,
    split_targets,
    vocabulary_sizes,
)
from diptych.data_prep.text_to_ids.languages import codes_of, resolved
from diptych.data_prep.text_to_ids.lossy_text import Loss, source_losses, target_losses
from diptych.data_prep.text_to_ids.rendered_text import from_marked, marked
from diptych.data_prep.text_to_ids.templates import Template

SENSITIVE_EXAMPLES = 5
"""Of each kind and batch, for the report."""

LANGUAGE_FIELDS = ("source_language", "target_language")
TEXT_FIELDS = [
    pyarrow.field("source", pyarrow.string()),
    pyarrow.field("target", pyarrow.string()),
    pyarrow.field("instruction", pyarrow.string()),
    pyarrow.field("input", pyarrow.string()),
    pyarrow.field("origin", pyarrow.string()),
    pyarrow.field("raw", pyarrow.string()),
    pyarrow.field("source_number", pyarrow.int32()),
    pyarrow.field("source_key", pyarrow.uint64()),
    pyarrow.field("target_key", pyarrow.uint64()),
    pyarrow.field("input_key", pyarrow.uint64()),
    pyarrow.field("output_key", pyarrow.uint64()),
    pyarrow.field("row_key", pyarrow.uint64()),
    *(pyarrow.field(name, pyarrow.string()) for name in LANGUAGE_FIELDS),
]
SIGNATURE_FIELD = pyarrow.field("signature", pyarrow.binary())
ID_FIELDS = [
    pyarrow.field("input_ids", pyarrow.list_(pyarrow.int32())),
    pyarrow.field("labels", pyarrow.list_(pyarrow.int32())),
    pyarrow.field("source_tokens", pyarrow.int32()),
    pyarrow.field("target_tokens", pyarrow.int32()),
]
SIDES = ("source", "target")
LOSSY = "text that the tokenizer cannot write"
FINAL_COLUMNS = ("input_ids", "labels", "source", "target", "instruction", "input", "origin", *LANGUAGE_FIELDS)


class Check(Protocol):
    """A filter, or the index of texts that training must not hold: why a record is not kept, or None."""

    def check(self, record: Record) -> tuple[str, str] | None: ...


class LengthLimits(NamedTuple):
    """How long the two sides may be, what is done with what is longer (error, drop or cut), and with what the
    tokenizer cannot write (keep, drop or error)."""

    max_source_tokens: int
    max_target_tokens: int
    too_long: str
    end_cut_targets: bool
    lossy_text: str = "keep"


class RenderedRow(NamedTuple):
    """A record, the row that it is from, and what the template made of it."""

    record: Record | Tokenised
    raw: str
    source: str
    target: str


@dataclass
class Counts:
    """What a batch adds to the report."""

    unused_fields: Counter[str] = field(default_factory=Counter)
    source_scripts: Counter[str] = field(default_factory=Counter)
    target_scripts: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    sensitive: Counter[str] = field(default_factory=Counter)
    sensitive_examples: list[dict[str, str]] = field(default_factory=list)
    spelled: Counter[str] = field(default_factory=Counter)
    """Added tokens that stood in texts, and were encoded as their characters."""
    lost: Counter[str] = field(default_factory=Counter)
    """Examples of which the tokenizer loses something: "line breaks of the target"."""
    lost_examples: list[dict[str, str]] = field(default_factory=list)
    """Of each kind and batch the first: kind, origin, example."""
    looked_at: Counter[str] = field(default_factory=Counter)
    """Sources and targets that were looked at for this."""
    given: Counter[str] = field(default_factory=Counter)
    """Rows that have an instruction, and that have an input."""
    decomposed: Counter[str] = field(default_factory=Counter)
    """Rows of each file with a text that is not in Unicode's form NFC, such as Hangul in single jamo."""

    rows: int = 0
    """As they stand in the data, where one may give several examples."""

    def add(self, other: Counts) -> None:
        self.rows += other.rows
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
        self.sensitive_examples += other.sensitive_examples
        known = {example["kind"] for example in self.lost_examples}
        self.lost_examples += [example for example in other.lost_examples if example["kind"] not in known]


class Batch(NamedTuple):
    """What became of a chunk: every example that its rows gave is one, or a reject."""

    examples: pyarrow.RecordBatch
    rejects: list[Reject]
    counts: Counts
    bytes_done: int = 0

    @property
    def examples_read(self) -> int:
        return self.examples.num_rows + len(self.rejects)


@dataclass(frozen=True)
class Stages:
    """Everything that decides what becomes of a row."""

    converters: tuple[Converter, ...]
    """One for each source."""
    template: Template
    tokenizer: PreTrainedTokenizerBase | None
    """None where it has still to be trained; `encode` follows then."""
    lengths: LengthLimits
    checks: tuple[Check, ...] = ()
    shingles: Shingles | None = None
    """How near duplicates are looked for; None for not at all."""
    sensitive: bool = False
    checked: tuple[bool, ...] = ()
    """For each source, whether `checks` are for it: a test set of the user's own stays as it is."""

    def run(self, chunk: Chunk, source_number: int) -> Batch:
        rejects: list[Reject] = []
        counts = Counts()
        checks = self.checks if not self.checked or self.checked[source_number] else ()
        records = self._records(chunk.rows(), self.converters[source_number], checks, rejects, counts)
        examples = render(self.template, records, rejects, self.tokenizer)
        self._count(examples, counts)
        batch = self.arrow(examples, source_number)
        if self.tokenizer is not None:
            batch = encode_batch(batch, self.tokenizer, self.template, self.lengths, rejects, counts, examples)
        return Batch(batch, rejects, counts, chunk.bytes_done)

    def encode(self, batch: pyarrow.RecordBatch) -> Batch:
        """The second half of `run`, for a tokenizer that was not there yet."""
        rejects, counts = [], Counts()
        return Batch(
            encode_batch(batch, self.tokenizer, self.template, self.lengths, rejects, counts), rejects, counts
        )

    def _records(
        self,
        rows: Iterable[Row | Reject],
        converter: Converter,
        checks: Sequence[Check],
        rejects: list[Reject],
        counts: Counts,
    ) -> list[tuple[Record | Tokenised, str]]:
        """Each with its row as it was read."""
        records = []
        for row in rows:
            counts.rows += 1
            if isinstance(row, Reject):
                rejects.append(row)
                continue
            counts.unused_fields.update(converter.unused_fields(row))
            for result in converter.records(row):
                if isinstance(result, Reject):
                    rejects.append(result)
                elif fault := _fault(result, checks):
                    rejects.append(Reject(result.origin, None, *fault, row.raw))
                else:
                    records.append((result, row.raw))
        return records

    def _count(self, examples: list[RenderedRow], counts: Counts) -> None:
        for record in (example.record for example in examples):
            if isinstance(record, Tokenised):
                continue
            counts.given.update(name for name in ("instruction", "input") if getattr(record, name))
            counts.source_scripts[script_of(record.input or record.instruction)] += 1
            counts.target_scripts[script_of(record.output)] += 1
            if not is_composed(record):
                counts.decomposed[record.origin.file] += 1
            if record.category:
                counts.categories[record.category] += 1
            if self.sensitive:
                _count_sensitive(record, counts)

    def arrow(self, examples: list[RenderedRow], source_number: int) -> pyarrow.RecordBatch:
        records = [example.record for example in examples]
        keys = numpy.array([_keys(example) for example in examples], dtype=numpy.uint64).reshape(-1, 5)
        columns = [
            [marked(example.source) for example in examples],
            [marked(example.target) for example in examples],
            [getattr(record, "instruction", "") for record in records],
            [getattr(record, "input", "") for record in records],
            [str(record.origin) for record in records],
            [_writable(example.raw) for example in examples],
            numpy.full(len(examples), source_number, dtype=numpy.int32),
            *keys.T,
            *([getattr(record, "languages", Languages())[side] for record in records] for side in (0, 1)),
        ]
        fields = list(TEXT_FIELDS)
        if self.shingles is not None:
            fields.append(SIGNATURE_FIELD)
            rows = signatures([_compared(example) for example in examples], self.shingles)
            columns.append([row.tobytes() for row in rows])
        arrays = [pyarrow.array(column, it.type) for column, it in zip(columns, fields, strict=True)]
        return pyarrow.RecordBatch.from_arrays(arrays, schema=pyarrow.schema(fields))


def _fault(record: Record | Tokenised, checks: Sequence[Check]) -> tuple[str, str] | None:
    if isinstance(record, Tokenised):
        return None
    return next((fault for check in checks if (fault := check.check(record))), None)


def render(
    template: Template,
    records: Iterable[tuple[Record | Tokenised, str]],
    rejects: list[Reject],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[RenderedRow]:
    """A row that a user's template cannot render, or of which it makes nothing, is a reject like any other; so is one
    whose languages the tokenizer does not know."""
    codes = codes_of(tokenizer)
    found: dict[Languages, Languages] = {}
    examples = []
    for record, raw in records:
        if isinstance(record, Tokenised):
            if codes.tokens:
                labels = codes.start_first(record.labels)
                record = replace(record, labels=labels, languages=codes.read_from(record.input_ids, labels))
            examples.append(RenderedRow(record, raw, "", ""))
            continue
        try:
            if record.languages not in found:
                found[record.languages] = resolved(tokenizer, record.languages, template.decoder_prefix)
            languages = found[record.languages]
            instruction = codes.instruction(record.instruction, languages)
        except UnknownLanguage as error:
            rejects.append(Reject(record.origin, None, "unknown language", error.fault, raw))
            continue
        if languages != record.languages or instruction != record.instruction:
            record = replace(record, languages=languages, instruction=instruction)
        try:
            source = template.render_source(record.instruction, record.input, record.history, record.system)
            target = template.render_target(record.output)
        except UserError as error:
            rejects.append(Reject(record.origin, None, "template failed", str(error), raw))
            continue
        if source.strip() and target.strip():
            examples.append(RenderedRow(record, raw, source, target))
        else:
            side = "target" if source.strip() else "source"
            reason = f"template {template.name} makes an empty {side} of it."
            rejects.append(Reject(record.origin, None, "template empty", reason, raw))
    return examples


def encode_batch(
    batch: pyarrow.RecordBatch,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    lengths: LengthLimits,
    rejects: list[Reject],
    counts: Counts,
    examples: Sequence[RenderedRow] = (),
) -> pyarrow.RecordBatch:
    """The same rows with ID_FIELDS, less those that end as rejects. `given` are the rows that came as token ids."""
    source_texts, target_texts = ([from_marked(text) for text in batch[side].to_pylist()] for side in SIDES)
    counts.spelled.update(spelled_added_tokens(tokenizer, [*source_texts, *target_texts]))
    languages = [Languages(*pair) for pair in zip(*(batch[it].to_pylist() for it in LANGUAGE_FIELDS), strict=True)]
    sources = split_sources(tokenizer, source_texts, languages)
    targets = split_targets(tokenizer, target_texts, template.decoder_prefix, languages)
    given = {place for place, example in enumerate(examples) if isinstance(example.record, Tokenised)}
    ends = vocabulary_sizes(tokenizer) if given else ()
    for place in given:
        sources[place] = Encoding([], list(examples[place].record.input_ids), [])
        targets[place] = Encoding([], list(examples[place].record.labels), [])
    fitting = sources
    if lengths.too_long == "cut":
        fitting = _cut_sources(sources, source_texts, languages, given, tokenizer, lengths)
    written = [place for place in range(len(targets)) if place not in given]
    unknown = source_losses(tokenizer, source_texts, sources, written)
    losses = target_losses(tokenizer, target_texts, targets, written, lengths.lossy_text != "keep")
    kept, columns = [], ([], [], [], [])
    for place, (source, target) in enumerate(zip(sources, targets, strict=True)):
        source_ids, target_ids, fault = _fitted(fitting[place], target, lengths)
        if fault is None and place in given:
            fault = _unknown_token((source_ids, target_ids), ends)
        elif fault is None:
            lost = {"source": unknown.get(place), "target": losses.get(place)}
            fault = _lossy(lost) if lengths.lossy_text != "keep" else None
        if fault is not None:
            rejects.append(Reject(origin_of(batch, place), None, *fault, batch["raw"][place].as_py()))
            continue
        kept.append(place)
        if place not in given and any(lost.values()):
            _count_lost(lost, batch["origin"][place].as_py(), counts)
        for column, value in zip(
            columns, (source_ids, target_ids, source.token_count, target.token_count), strict=True
        ):
            column.append(value)
    counts.looked_at.update(source=len(kept) - len(given.intersection(kept)), target=len(losses.keys() & kept))
    for side, texts in zip(SIDES, (source_texts, target_texts), strict=True):  # as people read them, without marks
        column = pyarrow.array(list(map(str, texts)), pyarrow.string())
        batch = batch.set_column(batch.schema.get_field_index(side), side, column)
    if len(kept) < batch.num_rows:
        batch = batch.take(pyarrow.array(kept, pyarrow.int64()))
    arrays = [pyarrow.array(column, it.type) for column, it in zip(columns, ID_FIELDS, strict=True)]
    return pyarrow.RecordBatch.from_arrays(
        [*batch.columns, *arrays], schema=pyarrow.schema([*batch.schema, *ID_FIELDS])
    )


def _cut_sources(
    sources: Sequence[Encoding],
    texts: Sequence[str],
    languages: Sequence[Languages],
    given: set[int],
    tokenizer: PreTrainedTokenizerBase,
    lengths: LengthLimits,
) -> list[Encoding]:
    """Those over the limit with less of what the user wrote; ids that were given lose their end."""
    limit, cut = lengths.max_source_tokens, list(sources)
    for place, source in enumerate(sources):
        if source.token_count <= limit:
            continue
        if place in given:
            cut[place] = source._replace(content=source.content[:limit])
        else:
            text = shortened(tokenizer, texts[place], limit, languages[place])
            cut[place] = split_sources(tokenizer, [text], [languages[place]])[0]
    return cut


def _fitted(
    source: Encoding, target: Encoding, lengths: LengthLimits
) -> tuple[list[int], list[int], tuple[str, str] | None]:
    """`input_ids`, `labels`, and the fault (kind, reason) of a row that is not kept."""
    for side, encoding in (("source", source), ("target", target)):
        if not encoding.content:
            return [], [], ("no tokens", f"the tokenizer makes no token of the {side}.")
    treatment = "cut" if lengths.too_long == "cut" else "drop"  # an error is raised where all rejects come together
    source_ids = fit(source, lengths.max_source_tokens)  # has been cut; if it is too long still, that is the template
    target_ids = fit(target, lengths.max_target_tokens, treatment, lengths.end_cut_targets)
    for side, ids, encoding, limit in (
        ("source", source_ids, source, lengths.max_source_tokens),
        ("target", target_ids, target, lengths.max_target_tokens),
    ):
        if ids is None:
            what = "template's own text" if treatment == "cut" else side
            reason = f"the {what} has {encoding.token_count:,} tokens, and max_{side}_tokens is {limit:,}."
            return [], [], (f"{side} over the limit", reason)
    return source_ids, target_ids, None


def _lossy(lost: Mapping[str, Loss | None]) -> tuple[str, str] | None:
    found = next(((side, loss) for side, loss in lost.items() if loss), None)
    if found is None:
        return None
    side, loss = found
    return LOSSY, f"the tokenizer loses {' and '.join(loss.kinds)} of the {side}: {loss.example}."


def _count_lost(lost: Mapping[str, Loss | None], origin: str, counts: Counts) -> None:
    for side, loss in lost.items():
        for kind in loss.kinds if loss else ():
            name = f"{kind} of the {side}"
            counts.lost[name] += 1
            if counts.lost[name] == 1:
                counts.lost_examples.append({"kind": name, "origin": origin, "example": loss.example})


def _keys(example: RenderedRow) -> tuple[int, int, int, int, int]:
    record = example.record
    if isinstance(record, Tokenised):
        source, target = (xxhash.xxh3_64_intdigest(str(ids).encode()) for ids in (record.input_ids, record.labels))
        return source, target, source, target, source
    of_direction = f"\0{record.languages.target}" if record.languages.target else ""
    exact = exact_key(example.source + of_direction), exact_key(example.target)
    return *exact, *record_keys(record), text_key(example.source)


def _compared(example: RenderedRow) -> str:
    return "" if isinstance(example.record, Tokenised) else compared_text(example.record)


def _unknown_token(row: Sequence[Sequence[int]], ends: Sequence[int]) -> tuple[str, str] | None:
    """Rows that came as token ids may be of another tokenizer. `ends` are the sizes of each side's vocabulary."""
    for ids, end in zip(row, ends, strict=True):
        if max(ids) >= end:
            return "unknown token", f"it holds the token {max(ids)}, and the ids of the tokenizer end at {end - 1}."
    return None


def _writable(raw: str) -> str:
    """As rejects.jsonl has it: shortened, and what is no character in a field that nobody reads, spelled."""
    raw = raw[:RAW_CHARACTERS_KEPT]
    return raw if raw.isascii() else raw.encode("utf-8", "backslashreplace").decode("utf-8")


def origin_of(batch: pyarrow.RecordBatch | pyarrow.Table, place: int) -> Origin:
    """As it was before it became a text: "rows.jsonl:7.2" is the second example of row 7."""
    file, _, place_in_file = batch["origin"][place].as_py().rpartition(":")
    row, _, instance = place_in_file.partition(".")
    return Origin(file, int(row), int(instance or 0))


def _count_sensitive(record: Record, counts: Counts) -> None:
    for place, finding in find_in_record(record):
        counts.sensitive[finding.kind] += 1
        if counts.sensitive[finding.kind] <= SENSITIVE_EXAMPLES:
            shown = masked(getattr(record, place), finding)
            example = {"origin": str(record.origin), "field": place, "kind": finding.kind, "masked": shown}
            counts.sensitive_examples.append(example)
