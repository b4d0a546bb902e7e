"""What happens to each row: a chunk of rows in, a batch of examples and rejects out.

    Chunk ─ convert, check, filter, render, encode ─▶ Batch(examples: an Arrow record batch, rejects, counts, …)

    source, target          the rendered texts          instruction, input    as the data has them
    origin                  "rows.jsonl:7"              source_number         which source it came from
    raw                     the row as it was read, for rejects.jsonl if it is left out later
    input_ids, labels       token ids, cut to the limits if so told           source_tokens, target_tokens  before that
    source_key, target_key  64-bit hashes of the rendered texts, by which exact duplicates are found; the second one
                            is of both answers of a pair, and of a mark
    source_language, target_language   codes, as the tokenizer has them; "" where there are none
    any of keep_columns     what the row has there, as text; "" where it has nothing
    input_key, output_key   64-bit hashes of what splits.py compares, so that no text is in two splits;
    row_key                 the same for the whole source
    signature               MinHash of source and target, where near duplicates are sought

Pairs of answers have the chosen one in `target` and `labels`, and of the other `rejected`, `rejected_key` (for
splits.py), `other_labels` and `rejected_tokens`; marked answers have `mark`, 1 or -1.

`Stages` is plain data that can be sent to a worker. The same chunk gives the same batch on one core, in a pool, or in
another engine.
"""

import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy
import pyarrow
import xxhash
from transformers import PreTrainedTokenizerBase

from diptych.data_prep.cleaning.duplicates import compared_text, exact_key, signatures
from diptych.data_prep.cleaning.filters import SchemaFilter, is_composed, script_of
from diptych.data_prep.cleaning.sensitive import find_in_record, masked
from diptych.data_prep.cleaning.splits import record_keys, text_key
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.reading.sources import Chunk
from diptych.data_prep.rows.convert_rows import MISSING, Converter, value_at
from diptych.data_prep.rows.language_names import UnknownLanguage
from diptych.data_prep.rows.records import (
    Languages,
    Origin,
    Preferences,
    Record,
    Reject,
    Row,
    Tokenised,
    shortened_raw,
)
from diptych.data_prep.rows.terms import Terms, masked_pair, missing, with_marks
from diptych.data_prep.rows.valid_text import is_missing
from diptych.data_prep.text_to_ids.encode import (
    Encoding,
    shortened,
    spelled_added_tokens,
    split_sources,
    split_targets,
    vocabulary_sizes,
)
from diptych.data_prep.text_to_ids.languages import codes_of, resolved
from diptych.data_prep.text_to_ids.rendered_text import from_marked, marked
from diptych.data_prep.text_to_ids.templates import Template
from diptych.data_prep.text_to_ids.tokenizer_losses import source_losses, target_losses

SENSITIVE_EXAMPLES = 5
"""Of each kind in a batch, for the report."""

LANGUAGE_FIELDS = ("source_language", "target_language")
KEY_FIELDS = ("source_key", "target_key", "input_key", "output_key", "row_key")
TEXT_FIELDS = [
    *(pyarrow.field(name, pyarrow.string()) for name in ("source", "target", "instruction", "input", "origin", "raw")),
    pyarrow.field("source_number", pyarrow.int32()),
    *(pyarrow.field(name, pyarrow.uint64()) for name in KEY_FIELDS),
    *(pyarrow.field(name, pyarrow.string()) for name in LANGUAGE_FIELDS),
]
SIGNATURE_FIELD = pyarrow.field("signature", pyarrow.binary())
ID_FIELDS = [
    *(pyarrow.field(name, pyarrow.list_(pyarrow.int32())) for name in ("input_ids", "labels")),
    *(pyarrow.field(name, pyarrow.int32()) for name in ("source_tokens", "target_tokens")),
]
SIDES = ("source", "target")
REJECTED_KEY_FIELD = pyarrow.field("rejected_key", pyarrow.uint64())
PAIR_TEXT_FIELDS = [pyarrow.field("rejected", pyarrow.string()), REJECTED_KEY_FIELD]
PAIR_ID_FIELDS = [
    pyarrow.field("other_labels", pyarrow.list_(pyarrow.int32())),
    pyarrow.field("rejected_tokens", pyarrow.int32()),
]
MARK_FIELD = pyarrow.field("mark", pyarrow.int8())
NAMES_OF_SIDES = {"source": "source", "target": "target", "rejected": "rejected answer"}
NAMES_OF_JUDGED = {"pairs": "chosen answer", "marks": "marked answer"}
"""Of the target, where it matters that it was judged. Both are for messages."""
OVER_THE_LIMIT = tuple(f"{it} over the limit" for it in (*NAMES_OF_SIDES.values(), *NAMES_OF_JUDGED.values()))
"""Kinds of rejects."""
LOSSY = "text that the tokenizer cannot write"
OWN_COLUMNS = frozenset(it.name for it in (*TEXT_FIELDS, *ID_FIELDS, SIGNATURE_FIELD)) | {"place", "decoder_start"}
"""Names that keep_columns cannot give."""
PREFERENCE_COLUMNS = frozenset(it.name for it in (*PAIR_TEXT_FIELDS, *PAIR_ID_FIELDS, MARK_FIELD))
"""Nor these, in data of preferences."""
FINAL_COLUMNS = ("input_ids", "labels", "source", "target", "instruction", "input", "origin", *LANGUAGE_FIELDS)


IN_FORM = "target in the form that outputs of the JSON schema have: names in its order, and no escapes"
WITH_TERMS, WITH_PLACEHOLDERS = "source with marks of terms", "source and target with placeholders"

KindAndReason = tuple[str, str]
"""Of a reject."""


class Check(Protocol):
    """A filter: None for a record that is kept, else why it is not. Decontamination is one too."""

    def check(self, record: Record) -> KindAndReason | None: ...


class RenderedRow(NamedTuple):
    """A record, the row that it is from, and what the template made of it."""

    record: Record | Tokenised
    row: Row
    source: str
    target: str
    rejected: str = ""
    plain: tuple[str, str] | None = None
    """Source and target without marks of terms and placeholders, where they have any."""


@dataclass
class Counts:
    """Counts and examples for the report and the warnings, of a batch or of all."""

    unused_fields: Counter[str] = field(default_factory=Counter)
    source_scripts: Counter[str] = field(default_factory=Counter)
    target_scripts: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    sensitive: Counter[str] = field(default_factory=Counter)
    sensitive_examples: list[dict[str, str]] = field(default_factory=list)
    spelled: Counter[str] = field(default_factory=Counter)
    """Added tokens that texts spell; they were encoded as their characters."""
    lost: Counter[str] = field(default_factory=Counter)
    """How many examples lose something by the tokenizer, by kind: "line breaks of the target"."""
    lost_examples: list[dict[str, str]] = field(default_factory=list)
    """The first of each kind in a batch: kind, origin, example."""
    looked_at: Counter[str] = field(default_factory=Counter)
    """How many sources and targets were checked for this."""
    given: Counter[str] = field(default_factory=Counter)
    """Rows that have an instruction, and that have an input."""
    decomposed: Counter[str] = field(default_factory=Counter)
    """Rows of each file with a text that is not in Unicode's form NFC, such as Hangul in single jamo."""
    changed: Counter[str] = field(default_factory=Counter)
    """Examples whose texts a setting changed, by what was done."""

    rows: int = 0
    """Rows of the data; one may give several examples."""

    def add(self, other: "Counts") -> None:
        self.rows += other.rows
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
        self.sensitive_examples += other.sensitive_examples
        known = {example["kind"] for example in self.lost_examples}
        self.lost_examples += [example for example in other.lost_examples if example["kind"] not in known]


@dataclass
class Batch:
    """The result of a chunk: each example that its rows give is in `examples` or in `rejects`."""

    source_number: int = 0
    bytes_done: int = 0
    examples: pyarrow.RecordBatch | None = None
    rejects: list[Reject] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    @property
    def examples_read(self) -> int:
        return self.examples.num_rows + len(self.rejects)

    def reject(self, origin: Origin, kind: str, reason: str, raw: str) -> None:
        self.rejects.append(Reject(origin, None, kind, reason, raw))


@dataclass(frozen=True)
class Stages:
    """Everything that decides what is made of a row."""

    converters: tuple[Converter, ...]
    """One for each source."""
    template: Template
    tokenizer: PreTrainedTokenizerBase | None
    """None if it has still to be trained; then `run` makes texts alone, and `encode` is called later."""
    settings: PrepareSettings
    """Of these: lengths, too_long, lossy_text, sensitive, and how near duplicates are found."""
    checks: tuple[Check, ...]
    checked: tuple[bool, ...]
    """For each source, whether `checks` are for it: a test set of the user's own stays as it is."""

    terms: Terms | None = None
    """That are written into sources."""

    @property
    def has_signatures(self) -> bool:
        """Whether near duplicates are looked for."""
        return self.settings.near_duplicates is not None

    @property
    def preferences(self) -> Preferences | None:
        """What the data says of its answers; None where all rows are plain. Test sets may be plain in any case."""
        return next((it.format.preferences for it in self.converters if it.format.preferences), None)

    @property
    def schema(self) -> pyarrow.Schema:
        """Of the examples that `run` gives."""
        return pyarrow.schema([*self.text_fields, *(self.id_fields if self.tokenizer is not None else ())])

    @property
    def text_fields(self) -> list[pyarrow.Field]:
        kept = [pyarrow.field(name, pyarrow.string()) for name in self.settings.kept]
        of_preferences = {"pairs": PAIR_TEXT_FIELDS, "marks": [MARK_FIELD]}.get(self.preferences, [])
        return [*TEXT_FIELDS, *of_preferences, *kept, *([SIGNATURE_FIELD] if self.has_signatures else [])]

    @property
    def id_fields(self) -> list[pyarrow.Field]:
        return [*ID_FIELDS, *(PAIR_ID_FIELDS if self.preferences == "pairs" else ())]

    def run(self, chunk: Chunk, source_number: int) -> Batch:
        batch = Batch(source_number, chunk.bytes_done)
        rows = self._render(self._records(chunk.rows(), batch), batch)
        for row in rows:
            self._count(row.record, batch.counts)
        batch.examples = self._as_arrow(rows, source_number)
        if self.tokenizer is not None:
            given = {place: row.record for place, row in enumerate(rows) if isinstance(row.record, Tokenised)}
            batch.examples = self._encode(batch, given)
        return batch

    def encode(self, examples: pyarrow.RecordBatch) -> Batch:
        """The second half of `run`, for a tokenizer that was trained after it."""
        batch = Batch(examples=examples)
        batch.examples = self._encode(batch, {})
        return batch

    # From rows to texts

    def _records(self, rows: Iterable[Row | Reject], batch: Batch) -> Iterator[tuple[Record | Tokenised, Row]]:
        """Yields each record that passes the checks, with its row as it was read."""
        kept = {column.partition(".")[0] for column in self.settings.kept.values()}
        converter = self.converters[batch.source_number]
        checks = self.checks if self.checked[batch.source_number] else ()
        for row in rows:
            batch.counts.rows += 1
            if isinstance(row, Reject):
                batch.rejects.append(row)
                continue
            batch.counts.unused_fields.update(name for name in converter.unused_fields(row) if name not in kept)
            for record in converter.records(row):
                if isinstance(record, Reject):
                    batch.rejects.append(record)
                    continue
                faults = () if isinstance(record, Tokenised) else (check.check(record) for check in checks)
                if fault := next(filter(None, faults), None):
                    batch.reject(record.origin, *fault, row.raw)
                    continue
                for check in checks if isinstance(record, Record) else ():
                    if isinstance(check, SchemaFilter) and (formed := check.formed(record)) != record:
                        record = formed
                        batch.counts.changed[IN_FORM] += 1
                yield record, row

    def _render(self, records: Iterable[tuple[Record | Tokenised, Row]], batch: Batch) -> list[RenderedRow]:
        """Renders source and target. Rejects rows that the template cannot render or renders empty, and rows in
        languages that the tokenizer does not know."""
        codes, template = codes_of(self.tokenizer), self.template
        resolve = functools.cache(lambda languages: resolved(self.tokenizer, languages, template.decoder_prefix))
        rows = []
        for record, row in records:
            if isinstance(record, Tokenised):
                if codes.tokens:
                    labels = codes.start_first(record.labels)
                    record = replace(record, labels=labels, languages=codes.read_from(record.input_ids, labels))
                rows.append(RenderedRow(record, row, "", ""))
                continue
            try:
                languages = resolve(record.languages)
                instruction = codes.instruction(record.instruction, languages)
                if (languages, instruction) != (record.languages, record.instruction):
                    record = replace(record, languages=languages, instruction=instruction)
                is_own_set = not self.checked[batch.source_number]
                inline = record if is_own_set else self._with_inline(record, batch.counts)
                source, target = template.render(inline)
                plain = None if inline is record else template.render(record)
                rejected = template.render_target(record.rejected) if record.rejected else ""
            except UnknownLanguage as error:
                batch.reject(record.origin, "unknown language", error.fault, row.raw)
            except UserError as error:
                batch.reject(record.origin, "template failed", str(error), row.raw)
            else:
                texts = {"source": source, "target": target, **({"rejected": rejected} if record.rejected else {})}
                empty = next((NAMES_OF_SIDES[side] for side, text in texts.items() if not text.strip()), None)
                if empty is None:
                    rows.append(RenderedRow(record, row, **texts, plain=plain))
                else:
                    reason = f"template {template.name} makes an empty {empty} of it."
                    batch.reject(record.origin, "template empty", reason, row.raw)
        return rows

    def _with_inline(self, record: Record, counts: Counts) -> Record:
        """The record with marks of terms and with placeholders, if it is of the share that has them: by a hash of its
        texts, so that any number of workers chooses the same. The columns of the dataset keep the texts as they
        are."""
        settings, field = self.settings, "input" if record.input else "instruction"
        text, output = getattr(record, field), record.output
        if self.terms is None and not settings.placeholders:
            return record
        if xxhash.xxh64_intdigest(f"{text}\0{output}".encode()) >= settings.inline_share * 2**64:
            return record
        before = text
        if settings.placeholders and not record.rejected:
            text, output = masked_pair(text, output)
            counts.changed[WITH_PLACEHOLDERS] += text != before
        if self.terms is not None:
            found = [it for it in self.terms.found(text, record.languages) if not missing([it], output)]
            text = with_marks(text, found)
            counts.changed[WITH_TERMS] += bool(found)
        return record if text == before else replace(record, **{field: text}, output=output)

    def _count(self, record: Record | Tokenised, counts: Counts) -> None:
        if isinstance(record, Tokenised):
            return
        counts.given.update(name for name in ("instruction", "input") if getattr(record, name))
        counts.source_scripts[script_of(record.input or record.instruction)] += 1
        counts.target_scripts[script_of(record.output)] += 1
        if not is_composed(record):
            counts.decomposed[record.origin.file] += 1
        if record.category:
            counts.categories[record.category] += 1
        for place, finding in find_in_record(record) if self.settings.sensitive else ():
            counts.sensitive[finding.kind] += 1
            if counts.sensitive[finding.kind] <= SENSITIVE_EXAMPLES:
                shown = masked(getattr(record, place), finding)
                example = {"origin": str(record.origin), "field": place, "kind": finding.kind, "masked": shown}
                counts.sensitive_examples.append(example)

    def _as_arrow(self, rows: Sequence[RenderedRow], source_number: int) -> pyarrow.RecordBatch:
        records = [row.record for row in rows]
        keys = numpy.array([_keys(row) for row in rows], dtype=numpy.uint64).reshape(-1, len(KEY_FIELDS)).T
        columns = {
            "source": [marked(row.source) for row in rows],
            "target": [marked(row.target) for row in rows],
            "instruction": [getattr(record, "instruction", "") for record in records],
            "input": [getattr(record, "input", "") for record in records],
            "origin": [str(record.origin) for record in records],
            "raw": [shortened_raw(row.row.raw) for row in rows],
            "source_number": numpy.full(len(rows), source_number),
            **dict(zip(KEY_FIELDS, keys, strict=True)),
            **{name: [it.languages[side] for it in records] for side, name in enumerate(LANGUAGE_FIELDS)},
            **{name: [_kept(row.row, column) for row in rows] for name, column in self.settings.kept.items()},
        }
        if self.preferences == "pairs":
            columns["rejected"] = [marked(row.rejected) for row in rows]
            columns["rejected_key"] = [text_key(getattr(record, "rejected", "")) for record in records]
        elif self.preferences == "marks":
            columns["mark"] = [getattr(record, "mark", 0) for record in records]
        if self.has_signatures:
            texts = ["" if isinstance(record, Tokenised) else compared_text(record) for record in records]
            columns["signature"] = [row.tobytes() for row in signatures(texts, self.settings.shingle_size)]
        return pyarrow.RecordBatch.from_pydict(columns, pyarrow.schema(self.text_fields))

    # From texts to token ids

    def _encode(self, batch: Batch, given: Mapping[int, Tokenised]) -> pyarrow.RecordBatch:
        """The examples of the batch that are kept, with `id_fields`; the others become rejects. `given` are the rows
        that came as token ids, by place."""
        tokenizer, examples, settings = self.tokenizer, batch.examples, self.settings
        sides = (*SIDES, "rejected") if self.preferences == "pairs" else SIDES
        texts = {side: [from_marked(text) for text in examples[side].to_pylist()] for side in sides}
        batch.counts.spelled.update(spelled_added_tokens(tokenizer, [text for side in sides for text in texts[side]]))
        languages = [Languages(*it) for it in zip(*(examples[it].to_pylist() for it in LANGUAGE_FIELDS), strict=True)]
        sources = split_sources(tokenizer, texts["source"], languages)
        targets = split_targets(tokenizer, texts["target"], self.template.decoder_prefix, languages)
        for place, record in given.items():
            sources[place], targets[place] = (Encoding([], list(it), []) for it in (record.input_ids, record.labels))
        fitting = sources
        if settings.too_long == "cut":
            texts_and_languages = zip(sources, texts["source"], languages, strict=True)
            fitting = [self._cut(*it, place in given) for place, it in enumerate(texts_and_languages)]
        places = [place for place in range(len(targets)) if place not in given]
        losses = {
            "source": source_losses(tokenizer, texts["source"], sources, places),
            "target": target_losses(tokenizer, texts["target"], targets, places, settings.lossy_text != "keep"),
        }
        others: list[Encoding | None] = [None] * len(targets)
        if self.preferences == "pairs":
            pairs = [place for place, text in enumerate(texts["rejected"]) if text]
            rejected = split_targets(tokenizer, texts["rejected"], self.template.decoder_prefix, languages)
            others = [it if text else None for it, text in zip(rejected, texts["rejected"], strict=True)]
            of_pairs = (tokenizer, texts["rejected"], rejected, pairs, settings.lossy_text != "keep")
            losses["rejected"] = target_losses(*of_pairs)
        is_marked = [bool(mark) for mark in examples["mark"].to_pylist()] if self.preferences == "marks" else []
        sizes = vocabulary_sizes(tokenizer) if given else ()
        kept, ids = [], []
        for place, (source, target) in enumerate(zip(sources, targets, strict=True)):
            lost = {NAMES_OF_SIDES[side]: its.get(place) for side, its in losses.items()}
            row, fault = self._fitted(fitting[place], target, others[place], any(is_marked[place : place + 1]))
            if fault is None and place in given:  # these may be of another tokenizer
                above = [(max(ids), size) for ids, size in zip(row[:2], sizes, strict=True) if max(ids) >= size]
                for token, size in above[:1]:
                    what = f"it holds the token {token}, and the ids of the tokenizer end at {size - 1}."
                    fault = ("unknown token", what)
            for side, loss in lost.items() if fault is None and settings.lossy_text != "keep" else ():
                if loss and fault is None:
                    what = f"the tokenizer loses {' and '.join(loss.kinds)} of the {side}: {loss.example}."
                    fault = (LOSSY, what)
            if fault is not None:
                batch.reject(origin_of(examples, place), *fault, examples["raw"][place].as_py())
                continue
            kept.append(place)
            ids.append([*row[:2], source.token_count, target.token_count])
            if self.preferences == "pairs":
                ids[-1] += [*row[2:], others[place].token_count] if others[place] else [[], 0]
            for name, loss in ((f"{kind} of the {side}", it) for side, it in lost.items() if it for kind in it.kinds):
                batch.counts.lost[name] += 1
                if batch.counts.lost[name] == 1:
                    example = {"kind": name, "origin": examples["origin"][place].as_py(), "example": loss.example}
                    batch.counts.lost_examples.append(example)
        losses["source"] = dict.fromkeys(places)  # all of them were looked at
        batch.counts.looked_at.update({NAMES_OF_SIDES[side]: len(its.keys() & kept) for side, its in losses.items()})
        columns = dict(zip(examples.schema.names, examples.columns, strict=True))
        columns |= {side: pyarrow.array(map(str, texts[side]), pyarrow.string()) for side in sides}  # without marks
        columns = {name: column.take(pyarrow.array(kept, pyarrow.int64())) for name, column in columns.items()}
        columns |= {it.name: [row[place] for row in ids] for place, it in enumerate(self.id_fields)}
        return pyarrow.RecordBatch.from_pydict(columns, pyarrow.schema([*examples.schema, *self.id_fields]))

    def _cut(self, source: Encoding, text: str, languages: Languages, is_given: bool) -> Encoding:
        """Cuts a source to the limit: its fields get shorter, not the template's text. Ids that were given lose their
        end."""
        limit = self.settings.max_source_tokens
        if source.token_count <= limit:
            return source
        if is_given:
            return source._replace(content=source.content[:limit])
        return split_sources(self.tokenizer, [shortened(self.tokenizer, text, limit, languages)], [languages])[0]

    def _fitted(
        self, source: Encoding, target: Encoding, other: Encoding | None = None, is_marked: bool = False
    ) -> tuple[tuple[list[int], ...], KindAndReason | None]:
        """`input_ids`, `labels`, and the labels of the `other` answer of a pair; or none, and what is wrong with the
        row. An answer that was judged is never cut: its beginning alone was not."""
        settings, found, is_judged = self.settings, [], is_marked or other is not None
        is_cut = settings.too_long == "cut"  # to "error", rejects are raised where they are counted
        sides = {"source": source, "target": target, **({"rejected": other} if other else {})}
        for side, encoding in sides.items():
            name = NAMES_OF_JUDGED[self.preferences] if side == "target" and is_judged else NAMES_OF_SIDES[side]
            limit_name = "max_source_tokens" if side == "source" else "max_target_tokens"
            limit = getattr(settings, limit_name)
            if not encoding.content:
                return (), ("no tokens", f"the tokenizer makes no token of the {name}.")
            # Sources have been cut: one that is too long still has a template that is too long by itself.
            if encoding.token_count > limit and (side == "source" or is_judged or not is_cut):
                what = "template's own text" if is_cut and side == "source" else name
                reason = f"the {what} has {encoding.token_count:,} tokens, and {limit_name} is {limit:,}."
                whole = " An answer that was judged is not cut." if is_cut and side != "source" else ""
                return (), (f"{name} over the limit", reason + whole)
            found.append(encoding.ids(limit, settings.end_cut_targets))
        if other and found[1] == found[2]:
            return (), ("same tokens in both answers", "the tokenizer makes the same tokens of both answers.")
        return tuple(found), None


def _kept(row: Row, column: str) -> str:
    """Numbers, lists and objects as JSON writes them."""
    value = value_at(row.fields, column)
    if value is MISSING or is_missing(value):
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return shortened_raw(text)


def _keys(row: RenderedRow) -> tuple[int, ...]:
    """KEY_FIELDS."""
    record = row.record
    if isinstance(record, Tokenised):
        source, target = (xxhash.xxh3_64_intdigest(str(ids).encode()) for ids in (record.input_ids, record.labels))
        return source, target, source, target, source
    of_direction = f"\0{record.languages.target}" if record.languages.target else ""
    judged = f"\0{row.rejected}{record.mark or ''}" if row.rejected or record.mark else ""
    source, target = row.plain or (row.source, row.target)
    exact = exact_key(source + of_direction), exact_key(target + judged)
    return *exact, *record_keys(record), text_key(source)


def origin_of(batch: pyarrow.RecordBatch | pyarrow.Table, place: int) -> Origin:
    """Parsed from the column: "rows.jsonl:7.2" is the second example of row 7."""
    file, _, place_in_file = batch["origin"][place].as_py().rpartition(":")
    row, _, instance = place_in_file.partition(".")
    return Origin(file, int(row), int(instance or 0))
