"""`diptych prepare`: from files to a prepared dataset, in steps that a person can follow on the screen.

    diptych prepare --data my.jsonl --tokenizer path/to/checkpoint --out prepared
    diptych prepare --data tatoeba --template translate --train_tokenizer bpe --vocab_size 4000 --out prepared

read → validate → render the template → split → load or train the tokenizer → encode → pack → write. Tatoeba's 6,636
rows take 4 s on one core, most of it imports. A second run with the same inputs, settings and code finds its result
and ends.

Exit codes: 0 when a dataset was written or is used again, with a summary of the rows that were not kept if there are
any; 2 with one message when a person has to mend something first.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from diptych.data_prep.prepared import (
    check_replaceable,
    code_version,
    find_reusable,
    fingerprint,
    tokenizer_digest,
    write_prepared,
    write_rejects,
)
from diptych.data_prep.readers import Directions, Source, open_aligned, open_source
from diptych.data_prep.records import Record, Reject, Rejects, UserError
from diptych.data_prep.settings import PrepareSettings, parse_settings
from diptych.data_prep.splits import split_records
from diptych.data_prep.summary import packing_lines, packing_warnings, splits_line, summary_lines, usage_warnings
from diptych.data_prep.tables import (
    Example,
    encode_splits,
    packed_table,
    plan_packing,
    token_counts,
    vocabulary_size,
)
from diptych.data_prep.templates import TOKENIZER_KEY, Template, attach_template, load_template, template_of
from diptych.data_prep.train_tokenizer import train_tokenizer
from diptych.data_prep.validate import FIELDS, validate


def main(argv: Sequence[str] | None = None) -> int:
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    try:
        prepare(parse_settings(sys.argv[1:] if argv is None else argv))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(settings: PrepareSettings) -> Path:
    """The whole way, told in order. Returns the folder of the prepared dataset."""
    folder = Path(settings.out).expanduser().resolve()
    sources = _open_sources(settings)
    tokenizer, template = _load_tokenizer_and_template(settings)
    decoder_start = _decoder_start(settings) if settings.packing else None
    wanted = fingerprint({**_facts(settings, sources, tokenizer, template), "decoder_start": decoder_start})
    if (manifest := find_reusable(folder, wanted)) is not None:
        print(f"Reused     {folder}: nothing has changed since it was prepared")
        print("\n".join([splits_line(manifest), *packing_lines(manifest)]))
        _warn(packing_warnings(manifest))
        return folder
    check_replaceable(folder)

    rejects = Rejects(settings.strict)
    records, unused_fields = _read(sources, rejects)
    rows_read = len(records) + len(rejects.rows)
    examples = _render(template, records, rejects)
    _need_rows(examples, rejects, folder)
    split = split_records(
        [example.record for example in examples],
        settings.validation_fraction,
        settings.test_fraction,
        settings.seed,
        settings.split_by,
    )
    if tokenizer is None:
        texts = _train_texts(examples, split.names)
        tokenizer = train_tokenizer(settings.train_tokenizer, texts, settings.vocab_size)
        attach_template(tokenizer, template)
        _check_decoder_start(settings, tokenizer)  # of little data fewer tokens are made than asked for
    limits = {"source": settings.max_source_tokens, "target": settings.max_target_tokens}
    tables = encode_splits(tokenizer, examples, split.names, rejects, *limits.values(), settings.workers)
    _need_rows(tables.get("train", ()), rejects, folder)

    plan = None
    if settings.packing:
        budget = (settings.packed_source_tokens, settings.packed_target_tokens)
        start = decoder_start or (tokenizer.pad_token_id, "assumed")
        plan = plan_packing(tables["train"], tokenizer, start, budget, settings.share_sources, settings.seed)

    kept = sum(len(table) for table in tables.values())
    assert kept + len(rejects.rows) == rows_read, (kept, len(rejects.rows), rows_read)
    manifest = {
        "fingerprint": wanted,
        "rows": {"read": rows_read, "kept": kept, "rejected": len(rejects.rows)},
        "rejected_by_kind": rejects.by_kind(),
        "splits": {name: len(table) for name, table in tables.items()},
        "groups": split.groups,
        "tokens": token_counts(tables, limits),
        "packing": plan.entry if plan else None,
        "inputs": [{"name": source.name, "digest": source.digest} for source in sources],
        "template": asdict(template),
        "tokenizer": {
            "from": settings.tokenizer or f"{settings.train_tokenizer} trained on the train split",
            "class": type(tokenizer).__name__,
            "tokens": len(tokenizer),
        },
        "settings": asdict(settings),
        "code": code_version(),
        "versions": {"datasets": datasets.__version__, "transformers": transformers.__version__},
    }
    tables = tables.remove_columns(["source_tokens", "target_tokens"])
    assemble = functools.partial(packed_table, plan) if plan else None
    write_prepared(folder, tables, tokenizer, rejects, manifest, assemble)
    print("\n".join(summary_lines(folder, manifest, rejects)))
    _warn([*usage_warnings(template, tokenizer, records, unused_fields), *split.warnings, *packing_warnings(manifest)])
    return folder


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _open_sources(settings: PrepareSettings) -> list[Source]:
    directions = Directions(settings.forward, settings.backward)
    sources = [open_source(entry, directions) for entry in settings.data]
    return [*sources, open_aligned(*settings.aligned, directions)] if settings.aligned else sources


def _load_tokenizer_and_template(settings: PrepareSettings) -> tuple[PreTrainedTokenizerBase | None, Template]:
    """The tokenizer is None where it has to be trained, which needs the train split first."""
    if settings.tokenizer is None:
        return None, load_template(settings.template or "alpaca")
    tokenizer = _load_tokenizer(settings)
    if settings.template is None and TOKENIZER_KEY in tokenizer.init_kwargs:
        template = template_of(tokenizer)
    else:
        template = load_template(settings.template or "alpaca")
    attach_template(tokenizer, template)
    return tokenizer, template


def _load_tokenizer(settings: PrepareSettings) -> PreTrainedTokenizerBase:
    name = settings.tokenizer
    if not Path(name).is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"the tokenizer '{name}' is a path, and there is no such folder. Mend it, or name a Hub id.")
    languages = {"src_lang": settings.source_language, "tgt_lang": settings.target_language}
    given = {keyword: code for keyword, code in languages.items() if code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **given)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:  # the last is of a config beside it
        raise UserError(f"the tokenizer '{name}' could not be loaded: {error}") from error
    is_multilingual = hasattr(tokenizer, "tgt_lang")
    if given and not is_multilingual:
        raise UserError(f"'{name}' puts no languages into texts. Drop source_language and target_language.")
    if is_multilingual and tokenizer.tgt_lang is None:
        raise UserError(f"'{name}' is multilingual. Give --source_language and --target_language.")
    for token in ("eos_token", "pad_token"):
        if getattr(tokenizer, token) is None:
            raise UserError(f"'{name}' has no {token}. Set tokenizer.{token}, save it, and use that folder.")
    _check_decoder_start(settings, tokenizer)
    return tokenizer


def _check_decoder_start(settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    start, last = settings.decoder_start_token_id, vocabulary_size(tokenizer) - 1
    if start is not None and start > last:
        name = f"'{settings.tokenizer}'" if settings.tokenizer else "the tokenizer trained here"
        raise UserError(
            f"decoder_start_token_id is {start}, but the token ids of {name} end at {last}. Give one up to there, or"
            " none: then it is what the checkpoint's config says, or else the padding token."
        )


def _decoder_start(settings: PrepareSettings) -> tuple[int, str] | None:
    """What training and `generate` will begin to write with, and who says so; None where nobody does.

    The order is that of `decoder_start_token` in finetune/families.py, read from the files without any model code.
    """
    if settings.decoder_start_token_id is not None:
        return settings.decoder_start_token_id, "setting"
    config = _model_config(settings.tokenizer) if settings.tokenizer else None
    if config is None or not getattr(config, "is_encoder_decoder", True):
        return None
    try:
        generation = GenerationConfig.from_pretrained(settings.tokenizer)
    except OSError:  # without a file of its own, a model makes it from its config
        generation = GenerationConfig.from_model_config(config)
    configured = getattr(config, "decoder_start_token_id", None)  # T5Gemma's config has no such field
    for token in (generation.decoder_start_token_id, configured, generation.bos_token_id):
        if token is not None:
            return token, "model config"
    return None


def _model_config(name: str) -> PreTrainedConfig | None:
    """A config of a kind that transformers does not know, such as Diptych's, is taken as it is written."""
    try:
        written, _ = PreTrainedConfig.get_config_dict(name)
    except OSError:  # a tokenizer alone
        return None
    if "model_type" not in written:
        return None
    if written["model_type"] not in CONFIG_MAPPING:  # its parts, such as panels, would stay dicts
        values = {key: value for key, value in written.items() if not isinstance(value, dict)}
        return PreTrainedConfig.from_dict(values)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"config.json of '{name}' is not valid: {error}. Mend it, or give --packing false.") from error


def _facts(
    settings: PrepareSettings,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase | None,
    template: Template,
) -> dict[str, Any]:
    """What decides the result. Inputs, template and tokenizer count by content, wherever the tokenizer lies."""
    no_decision = ("data", "aligned", "out", "template", "tokenizer", "workers", "strict")
    return {
        "inputs": [(source.name, source.digest) for source in sources],
        "template": asdict(template),
        "tokenizer": tokenizer_digest(tokenizer) if tokenizer else None,
        "settings": {name: value for name, value in asdict(settings).items() if name not in no_decision},
    }


def _read(sources: Sequence[Source], rejects: Rejects) -> tuple[list[Record], Counter]:
    """Every row becomes a record or a reject. Also counts the fields that nothing here uses."""
    records, unused_fields = [], Counter()
    for source in sources:
        for row in source.read():
            result = row if isinstance(row, Reject) else validate(row)
            if isinstance(result, Reject):
                rejects.add(result)
            else:
                records.append(result)
                unused_fields.update(name for name in row.fields if name not in FIELDS)
    return records, unused_fields


def _render(template: Template, records: Sequence[Record], rejects: Rejects) -> list[Example]:
    """A row that a user's template cannot render, or of which it makes nothing, is a reject like any other."""
    examples = []
    for record in records:
        try:
            source = template.render_source(record.instruction, record.input, record.history)
            target = template.render_target(record.output)
        except UserError as error:
            rejects.add_record(record, "template failed", str(error))
            continue
        if source.strip() and target.strip():
            examples.append(Example(record, source, target))
        else:
            side = "target" if source.strip() else "source"
            rejects.add_record(record, "template empty", f"template {template.name} makes an empty {side} of it.")
    return examples


def _need_rows(rows: Sequence, rejects: Rejects, folder: Path) -> None:
    """Without a row to train on there is no dataset, but what was wrong with each row is still written down."""
    if len(rows):
        return
    if not rejects.rows:
        raise UserError("there are no rows in what was read.")
    kinds = "; ".join(f"{count:,} × {kind}" for kind, count in list(rejects.by_kind().items())[:3])
    first, reasons = rejects.rows[0], folder.with_name(f"{folder.name}.rejects.jsonl")
    reasons.parent.mkdir(parents=True, exist_ok=True)
    write_rejects(reasons, rejects)
    raise UserError(
        f"none of the {len(rejects.rows):,} rows can be kept ({kinds}). The first, {first.origin}: {first.reason}"
        f" Mend the rows, and prepare them again. All of them: {reasons}"
    )


def _train_texts(examples: Sequence[Example], split_names: Sequence[str]) -> Iterator[str]:
    """What a tokenizer may learn from: held-out texts are unseen for it too."""
    for example, name in zip(examples, split_names, strict=True):
        if name == "train":
            yield example.source
            yield example.target


if __name__ == "__main__":
    sys.exit(main())
