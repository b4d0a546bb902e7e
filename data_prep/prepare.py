"""`diptych prepare`: from files to a prepared dataset, in one pass that a person can follow on the screen.

    diptych prepare --data my.jsonl --tokenizer path/to/checkpoint --out prepared
    diptych prepare --data tatoeba --template translate --train_tokenizer bpe --vocab_size 4000 --out prepared

read → validate → render the template → split → train or load the tokenizer → encode → write. The 6,636 rows of Tatoeba take
3 s on one core, most of it imports. A second run with the same inputs, settings and code finds its result and ends.

Exit codes: 0 when a dataset was written or reused, with a summary of the rows that were not kept if there were any; 2 with
one message when something has to be mended first.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import numpy
import transformers
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from diptych.data_prep.encode import split_sources, split_targets
from diptych.data_prep.prepared import (
    check_replaceable,
    code_version,
    find_reusable,
    fingerprint,
    tokenizer_digest,
    write_prepared,
)
from diptych.data_prep.readers import SAMPLES, Directions, Source, open_aligned, open_source
from diptych.data_prep.records import Record, Reject, UserError, nearest
from diptych.data_prep.splits import SPLITS, Split, split_records
from diptych.data_prep.summary import splits_line, summary_lines
from diptych.data_prep.templates import (
    TOKENIZER_KEY,
    Template,
    attach_template,
    load_template,
    template_of,
)
from diptych.data_prep.train_tokenizer import train_tokenizer
from diptych.data_prep.validate import FIELDS, validate

ROWS_PER_WORKER = (
    20_000  # below this, starting processes costs more than they save: fast tokenizers use all cores anyway
)
COLUMNS = ("source", "target", "instruction", "input", "origin")
PERCENTILES = (50, 90, 99, 100)
LIST_OPTIONS, FLAG_OPTION = ("--data", "--aligned"), "--strict"


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of `diptych prepare`; from the command line, or from a YAML file with --config."""

    data: list[str] | None = None
    """What to read, one or more: files (.json, .jsonl, .csv, .parquet with instruction, input and output; .tsv with
    parallel text), shipped samples (tatoeba, seed_tasks), Hub data sets (hf:user/name or hf:user/name:split)."""

    aligned: list[str] | None = None
    """Two text files of parallel text, where line N of one belongs to line N of the other."""

    forward: str | None = None
    """Instruction for parallel text from the first side to the second, such as 'Translate English to Korean:'. Without
    one, that direction gives no rows."""

    backward: str | None = None
    """Instruction for parallel text from the second side to the first."""

    out: str = "prepared"
    """Folder to write. Replaced if it holds an older prepared dataset and nothing else."""

    template: str | None = None
    """How a row becomes source text and target text: alpaca, plain, translate, or a Jinja file. Default: the template that
    the tokenizer carries, else alpaca."""

    tokenizer: str | None = None
    """An existing tokenizer, as a folder or a Hub id: the one of the checkpoint that will be fine-tuned."""

    train_tokenizer: str | None = None
    """Train a tokenizer on the train split instead: bpe or unigram."""

    vocab_size: int = 8000
    """Tokens of a trained tokenizer. More makes texts shorter and the model larger."""

    source_language: str | None = None
    """Language code of the sources, for tokenizers that put one into the text (mBART: en_XX, M2M100: en)."""

    target_language: str | None = None
    """Language code of the targets, for the same tokenizers."""

    max_source_tokens: int = 512
    """Longer sources lose their end. How many do is said and stands in manifest.json."""

    max_target_tokens: int = 512
    """Longer targets lose their end, but not their eos token."""

    validation_fraction: float = 0.05
    """Part of the rows that is held out to look at during training; 0 for none."""

    test_fraction: float = 0.05
    """Part of the rows that is held out to the end; 0 for none."""

    split_by: str = "both"
    """Which texts may not be in two splits: both (inputs and outputs) or source (inputs only, for data in which many
    rows share an output, such as classification)."""

    seed: int = 0
    """Decides which rows are held out."""

    workers: int = 0
    """Processes that encode; 0 picks by the number of rows and cores."""

    strict: bool = False
    """Stop at the first row that cannot be kept, with exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    try:
        prepare(parse_settings(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_settings(argv: Sequence[str]) -> PrepareSettings:
    """A field's docstring is its --help text. Lists take words up to the next option: `--data a.json b.json`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="diptych prepare", description=__doc__.split("\n")[0], exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    parser.add_class_arguments(PrepareSettings)
    try:
        parsed = parser.instantiate(parser.parse_args(_spell_out(argv)))
    except ArgumentError as error:
        raise UserError(f"{error}{_nearest_setting(str(error))}") from None
    settings = PrepareSettings(**{field.name: parsed[field.name] for field in fields(PrepareSettings)})
    _check(settings)
    return settings


def prepare(settings: PrepareSettings) -> Path:
    """The whole way, told in order. Returns the folder."""
    folder = Path(settings.out).resolve()
    sources = _open_sources(settings)
    tokenizer, template = _load_tokenizer_and_template(settings)
    wanted = fingerprint(_facts(settings, sources, tokenizer, template))
    if (manifest := find_reusable(folder, wanted)) is not None:
        print(f"Nothing has changed since {folder} was prepared: it is used again.")
        print(splits_line(manifest))
        return folder
    check_replaceable(folder)

    records, rejects, unused_fields = _read(sources, settings.strict)
    rows_read = len(records) + len(rejects)
    records, examples = _render(template, records, rejects, settings.strict)
    _need_rows(records, rejects)
    split = split_records(
        records, settings.validation_fraction, settings.test_fraction, settings.seed, settings.split_by
    )
    if tokenizer is None:
        tokenizer = train_tokenizer(settings.train_tokenizer, _train_texts(examples, split), settings.vocab_size)
        attach_template(tokenizer, template)
    encoded = _encode(tokenizer, records, examples, split, settings, rejects)
    _need_rows(encoded.get("train", ()), rejects)

    kept = sum(len(table) for table in encoded.values())
    assert kept + len(rejects) == rows_read, (kept, len(rejects), rows_read)
    manifest = {
        "fingerprint": wanted,
        "rows": {"read": rows_read, "kept": kept, "rejected": len(rejects)},
        "rejected_by_kind": dict(Counter(reject.kind for reject in rejects).most_common()),
        "splits": {name: len(table) for name, table in encoded.items()},
        "groups": split.groups,
        "tokens": _token_counts(encoded, settings),
        "inputs": [{"name": source.name, "digest": source.digest} for source in sources],
        "template": asdict(template),
        "tokenizer": {"from": _tokenizer_words(settings), "class": type(tokenizer).__name__, "tokens": len(tokenizer)},
        "settings": asdict(settings),
        "code": code_version(),
        "versions": {"datasets": datasets.__version__, "transformers": transformers.__version__},
    }
    tables = encoded.remove_columns(["source_tokens", "target_tokens"])
    write_prepared(folder, tables, tokenizer, rejects, manifest)
    for line in summary_lines(folder, manifest, rejects):
        print(line)
    for warning in [*_warnings(template, tokenizer, records, unused_fields), *split.warnings]:
        print(f"warning: {warning}", file=sys.stderr)
    return folder


def _train_texts(examples: list[tuple[str, ...]], split: Split) -> Iterator[str]:
    """Sources and targets that a tokenizer may learn from: held-out texts are unseen for it too."""
    for (source, target, *_), name in zip(examples, split.names, strict=True):
        if name == "train":
            yield source
            yield target


def _tokenizer_words(settings: PrepareSettings) -> str:
    if settings.tokenizer:
        return settings.tokenizer
    return f"{settings.train_tokenizer} trained on the train split"


def _warnings(
    template: Template,
    tokenizer: transformers.PreTrainedTokenizerBase,
    records: list[Record],
    unused_fields: Counter,
) -> Iterator[str]:
    """What was given and is not used, or not as one might expect."""
    if unused_fields:
        yield f"fields that are not used: {', '.join(name for name, _ in unused_fields.most_common())}."
    with_input = sum(bool(record.input) for record in records)
    if with_input and "input" not in template.source_variables():
        yield f"template {template.name} leaves out the input, and {with_input:,} rows have one."
    if "output" not in template.target_variables():
        yield f"template {template.name} leaves out the output: every target is the same."
    special_in_template = [
        token for token in tokenizer.all_special_tokens if token in template.source + template.target
    ]
    if special_in_template:
        yield (
            f"template {template.name} holds {', '.join(special_in_template)}. Text is always text here: special tokens"
            " are added by the tokenizer alone, so this is encoded as its characters."
        )


def _check(settings: PrepareSettings) -> None:
    if not settings.data and not settings.aligned:
        raise UserError(f"nothing to read: give --data FILE, --data {' or --data '.join(SAMPLES)}, or --aligned A B.")
    if settings.aligned and len(settings.aligned) != 2:
        raise UserError(f"--aligned takes two files, and got {len(settings.aligned)}.")
    if bool(settings.tokenizer) == bool(settings.train_tokenizer):
        raise UserError("give either --tokenizer FOLDER_OR_HUB_ID or --train_tokenizer bpe (or unigram).")
    if settings.split_by not in ("both", "source"):
        raise UserError(f"split_by is '{settings.split_by}'; it can be both or source.")
    for name in ("validation_fraction", "test_fraction"):
        if not 0 <= getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}; it is a part of all rows, from 0 to below 1.")
    if settings.validation_fraction + settings.test_fraction >= 1:
        raise UserError("validation_fraction and test_fraction together leave no rows to train on. Lower them.")
    for name in ("max_source_tokens", "max_target_tokens"):
        if getattr(settings, name) < 2:
            raise UserError(f"{name} is {getattr(settings, name)}; at least 2: one token of text and eos.")


def _spell_out(argv: Sequence[str]) -> list[str]:
    """What people type, as jsonargparse reads it: `--data a b --strict` → `--strict=true --data=["a", "b"]`."""
    lists: dict[str, list[str]] = {}
    others, current = [], None
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option in LIST_OPTIONS:
            current = lists.setdefault(option, [])
            current.extend([value] if equals else [])
        elif word.startswith("-"):
            current = None
            is_bare_flag = word == FLAG_OPTION and following not in ("true", "false")
            others.append(f"{word}=true" if is_bare_flag else word)
        else:
            (others if current is None else current).append(word)
    return [*others, *(f"{option}={json.dumps(words)}" for option, words in lists.items())]


def _nearest_setting(message: str) -> str:
    """jsonargparse says which key it does not know; people want to hear which one they meant."""
    known = {field.name for field in fields(PrepareSettings)}
    for word in message.replace("'", " ").replace("=", " ").split():
        if word.startswith("--") or word not in known:
            if (near := nearest(word.lstrip("-"), known, cutoff=0.7)) and near != word.lstrip("-"):
                return f". Did you mean '{near}'?"
    return ""


def _open_sources(settings: PrepareSettings) -> list[Source]:
    directions = Directions(settings.forward, settings.backward)
    sources = [open_source(entry, directions) for entry in settings.data or ()]
    return [*sources, open_aligned(*settings.aligned, directions)] if settings.aligned else sources


def _load_tokenizer_and_template(
    settings: PrepareSettings,
) -> tuple[transformers.PreTrainedTokenizerBase | None, Template]:
    """The tokenizer is None where it has to be trained; that needs the train split first."""
    if settings.tokenizer is None:
        return None, load_template(settings.template or "alpaca")
    tokenizer = _load_tokenizer(settings)
    if settings.template is None and TOKENIZER_KEY in tokenizer.init_kwargs:
        template = template_of(tokenizer)
    else:
        template = load_template(settings.template or "alpaca")
    attach_template(tokenizer, template)
    return tokenizer, template


def _load_tokenizer(settings: PrepareSettings) -> transformers.PreTrainedTokenizerBase:
    languages = {"src_lang": settings.source_language, "tgt_lang": settings.target_language}
    given = {name: code for name, code in languages.items() if code}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings.tokenizer, **given)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the tokenizer '{settings.tokenizer}' could not be loaded: {error}") from error
    is_multilingual = hasattr(tokenizer, "tgt_lang")
    if given and not is_multilingual:
        raise UserError(
            f"'{settings.tokenizer}' puts no languages into texts. Drop source_language and target_language."
        )
    if is_multilingual and tokenizer.tgt_lang is None:
        raise UserError(f"'{settings.tokenizer}' is multilingual. Give --source_language and --target_language.")
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"'{settings.tokenizer}' has no {name}. Set one, save the tokenizer, and use that folder.")
    return tokenizer


def _facts(
    settings: PrepareSettings,
    sources: list[Source],
    tokenizer: transformers.PreTrainedTokenizerBase | None,
    template: Template,
) -> dict[str, Any]:
    """What decides the result. Where it is written, by how many processes, and from which path is none of it."""
    decided_elsewhere = ("data", "aligned", "out", "template", "tokenizer", "workers", "strict")
    return {
        "inputs": [(source.name, source.digest) for source in sources],
        "template": asdict(template),
        "tokenizer": tokenizer_digest(tokenizer) if tokenizer else None,
        "settings": {name: value for name, value in asdict(settings).items() if name not in decided_elsewhere},
    }


def _read(sources: list[Source], strict: bool) -> tuple[list[Record], list[Reject], Counter]:
    """Every row becomes a record or a reject. Also counts the fields that nothing here uses."""
    records, rejects, unused_fields = [], [], Counter()
    for source in sources:
        for row in source.read():
            result = row if isinstance(row, Reject) else validate(row)
            if isinstance(result, Reject):
                _reject(result, rejects, strict)
            else:
                records.append(result)
                unused_fields.update(name for name in row.fields if name not in FIELDS)
    return records, rejects, unused_fields


def _reject(reject: Reject, rejects: list[Reject], strict: bool) -> None:
    if strict:
        raise UserError(f"{reject.origin}: {reject.reason} (--strict stops at the first row that cannot be kept.)")
    rejects.append(reject)


def _render(
    template: Template, records: list[Record], rejects: list[Reject], strict: bool
) -> tuple[list[Record], list[tuple[str, ...]]]:
    """Rows of COLUMNS. A row that a user's template cannot render is a reject like any other."""
    rendered, examples = [], []
    for record in records:
        reason = None
        try:
            source = template.render_source(record.instruction, record.input, record.history)
            target = template.render_target(record.output)
        except UserError as error:
            reason = str(error)
        else:
            if not source.strip() or not target.strip():
                reason = f"template {template.name} makes an empty {'target' if source.strip() else 'source'} of it."
        if reason is not None:
            _reject(_reject_of(record, "template", reason), rejects, strict)
            continue
        rendered.append(record)
        examples.append((source, target, record.instruction, record.input, str(record.origin)))
    return rendered, examples


def _reject_of(record: Record, kind: str, reason: str) -> Reject:
    raw = {field: getattr(record, field) for field in FIELDS}
    return Reject(record.origin, None, kind, reason, json.dumps(raw, ensure_ascii=False))


def _need_rows(rows: Sequence, rejects: list[Reject]) -> None:
    if len(rows):
        return
    if not rejects:
        raise UserError("there are no rows in what was read.")
    kinds = "; ".join(f"{count:,} × {kind}" for kind, count in Counter(r.kind for r in rejects).most_common(3))
    first = rejects[0]
    raise UserError(
        f"none of the {len(rejects):,} rows could be kept ({kinds}). The first, {first.origin}: {first.reason}"
    )


def _encode(
    tokenizer: transformers.PreTrainedTokenizerBase,
    records: list[Record],
    examples: list[tuple[str, ...]],
    split: Split,
    settings: PrepareSettings,
    rejects: list[Reject],
) -> datasets.DatasetDict:
    """Each split as a table. A text of which the tokenizer keeps nothing is found here, and its row is a reject."""
    encoded = datasets.DatasetDict()
    for name in SPLITS:
        rows = [row for row, row_split in enumerate(split.names) if row_split == name]
        if not rows:
            continue
        table = _encode_table(tokenizer, [examples[row] for row in rows], name, settings)
        empty = [place for place, side in enumerate(table["empty_side"]) if side]
        for place in empty:
            reason = f"the tokenizer makes no token of the {table[place]['empty_side']}."
            _reject(_reject_of(records[rows[place]], "no tokens", reason), rejects, settings.strict)
        table = table.remove_columns("empty_side")
        if len(empty) < len(rows):
            kept = sorted(set(range(len(rows))) - set(empty))
            encoded[name] = table.select(kept) if empty else table
    return encoded


def _encode_table(
    tokenizer: transformers.PreTrainedTokenizerBase,
    examples: list[tuple[str, ...]],
    name: str,
    settings: PrepareSettings,
) -> datasets.Dataset:
    table = datasets.Dataset.from_dict(dict(zip(COLUMNS, map(list, zip(*examples, strict=True)), strict=True)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = settings.workers or min(cores, 1 + len(examples) // ROWS_PER_WORKER)
    if workers > 1:  # the fast tokenizers' own threads do not survive the fork
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    limits = {"max_source_tokens": settings.max_source_tokens, "max_target_tokens": settings.max_target_tokens}
    return table.map(
        encode_rows,
        batched=True,
        num_proc=workers if workers > 1 else None,
        fn_kwargs={"tokenizer": tokenizer, **limits},
        features=datasets.Features({**table.features, **ENCODED_COLUMNS}),
        new_fingerprint=f"encoded-{name}",  # the library's own would pickle the tokenizer, and is not used
        desc=f"Encoding {name}",
    )


ENCODED_COLUMNS = {
    "input_ids": datasets.List(datasets.Value("int32")),
    "labels": datasets.List(datasets.Value("int32")),
    "source_tokens": datasets.Value("int32"),
    "target_tokens": datasets.Value("int32"),
    "empty_side": datasets.Value("string"),
}


def encode_rows(
    batch: dict[str, list[str]],
    tokenizer: transformers.PreTrainedTokenizerBase,
    max_source_tokens: int,
    max_target_tokens: int,
) -> dict[str, list[Any]]:
    """ENCODED_COLUMNS of some rows; `source_tokens` and `target_tokens` are counted before anything is cut."""
    sources, targets = split_sources(tokenizer, batch["source"]), split_targets(tokenizer, batch["target"])
    empty = [
        "" if source.content and target.content else "target" if source.content else "source"
        for source, target in zip(sources, targets, strict=True)
    ]
    return {
        "input_ids": [source.ids(max_source_tokens) for source in sources],
        "labels": [target.ids(max_target_tokens) for target in targets],
        "source_tokens": [source.token_count for source in sources],
        "target_tokens": [target.token_count for target in targets],
        "empty_side": empty,
    }


def _token_counts(encoded: datasets.DatasetDict, settings: PrepareSettings) -> dict[str, dict[str, int]]:
    counts = {}
    for side, limit in (("source", settings.max_source_tokens), ("target", settings.max_target_tokens)):
        lengths = numpy.concatenate([table[f"{side}_tokens"][:] for table in encoded.values()])
        percentiles = {f"p{p}": int(numpy.percentile(lengths, p, method="higher")) for p in PERCENTILES}
        counts[side] = {
            **percentiles,
            "total": int(lengths.sum()),
            "limit": limit,
            "cut": int((lengths > limit).sum()),
        }
    return counts


if __name__ == "__main__":
    sys.exit(main())
