"""`diptych tokenizer`: train a tokenizer, report on one, or extend a checkpoint's with tokens for new texts.

    diptych tokenizer train --data en.txt ko.txt --out my-tokenizer
    diptych tokenizer report google-t5/t5-small --data en.txt ko.txt --out report.json
    diptych tokenizer extend my-checkpoint --data my.ko.txt --tokens 2000 --out my-checkpoint-ko

Data are what `diptych prepare` reads, plain text (a text a line), and folders that it wrote (the texts of the train
split): see tokenizer_texts.py. Exit codes: 0 done, 2 with one message about a mistake that a person can correct.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers.utils import cached_file

from diptych.data_prep.cleaning.filters import script_of
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.command_line.overwrite_checks import check_overwrite, new_folder
from diptych.data_prep.command_line.run_command import run_command
from diptych.data_prep.text_to_ids.extend_tokenizer import (
    add_language_codes,
    add_new_tokens,
    check_extensible,
    learn_new_tokens,
)
from diptych.data_prep.text_to_ids.tokenizer_files import open_tokenizer
from diptych.data_prep.text_to_ids.train_tokenizer import (
    MOST_VOCAB_SIZE,
    curve_vocab_size,
    is_held_out,
    train_tokenizer,
    why_fewer,
)
from diptych.data_prep.text_to_ids.two_vocabularies import check_one_vocabulary
from diptych.data_prep.tokenizer_tools.text_command_settings import (
    ExtendTokenizerSettings,
    ReportTokenizerSettings,
    TrainTokenizerSettings,
    parse_tokenizer_settings,
)
from diptych.data_prep.tokenizer_tools.tokenizer_report import table_of, tokenizer_report
from diptych.data_prep.tokenizer_tools.tokenizer_texts import open_texts

REPORT = "tokenizer_report.json"
MODEL_CONFIGS = ("config.json", "generation_config.json")
TEXTS_MEASURED = 20_000
"""Held-out texts on which an extension is measured, at most."""


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("diptych tokenizer", parse_tokenizer_settings, run, argv)


def run(settings: TrainTokenizerSettings | ReportTokenizerSettings | ExtendTokenizerSettings) -> int:
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    ACTIONS[type(settings)](settings)
    return 0


def train(settings: TrainTokenizerSettings) -> None:
    out = new_folder(settings.out)
    texts = open_texts(settings.data, settings.text_fields)
    size, curve = settings.vocab_size, []
    if size == "auto":
        size, curve = curve_vocab_size(settings.kind, texts, settings.least_saving)
        print("vocabulary  tokens/word  bytes/token  saves")
        for point in curve:
            saving = "" if point.saving is None else f"{point.saving:.1%}"
            chosen = "  chosen" if point.vocab_size == size else ""
            figures = f"{point.vocab_size:10,}  {point.tokens_per_word:11.2f}  {point.bytes_per_token:11.2f}"
            print(f"{figures}  {saving:>5}{chosen}".rstrip())
        print()
    tokenizer = train_tokenizer(settings.kind, texts(), size)
    tokenizer.name_or_path = settings.out
    report = tokenizer_report(tokenizer, ((script_of(text), text) for text in texts()))
    texts.warn_of_rejects()
    if fewer := why_fewer(tokenizer, size):
        print(f"warning: {fewer}", file=sys.stderr)
    if curve:
        report |= {"vocab_size_curve": [asdict(point) for point in curve], "vocab_size_chosen": size}
    tokenizer.save_pretrained(out)
    _write_report(report, out / REPORT)
    print(table_of(report))


def report(settings: ReportTokenizerSettings) -> None:
    out = Path(settings.out).expanduser() if settings.out else None
    if out is not None:
        out = out if out.suffix == ".json" else out.with_name(f"{out.name}.json")
        check_overwrite(out, _is_report, "a report of `diptych tokenizer`")
    tokenizer = open_tokenizer(settings.tokenizer)
    check_one_vocabulary(tokenizer, settings.tokenizer, "a report is of one. Report on that of another checkpoint.")
    label = {"script": script_of, "language": _guess_language, "file": None}[settings.by]
    texts = open_texts(settings.data, settings.text_fields)
    found = tokenizer_report(tokenizer, ((label(text) if label else file, text) for file, text in texts.pairs()))
    texts.warn_of_rejects()
    print(table_of(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write_report(found, out)


def _guess_language(text: str) -> str:
    try:
        import py3langid
    except ImportError:
        raise UserError("by language needs py3langid: pip install 'diptych[clean]'. Or use by script.") from None
    return py3langid.classify(text)[0]


def extend(settings: ExtendTokenizerSettings) -> None:
    if not 1 <= settings.tokens <= MOST_VOCAB_SIZE:
        raise UserError(f"tokens is {settings.tokens:,}; 1 to {MOST_VOCAB_SIZE:,} tokens can be added.")
    out = new_folder(settings.out)
    tokenizer = open_tokenizer(settings.checkpoint)
    check_extensible(tokenizer)
    if settings.languages:
        tokenizer = add_language_codes(tokenizer, _languages_alike(settings.languages))
    texts = open_texts(settings.data, settings.text_fields)
    new = learn_new_tokens(
        tokenizer,
        lambda: (text for text in texts() if not is_held_out(text)),
        settings.tokens,
        settings.minimum_frequency,
    )
    texts.warn_of_rejects()
    if not new.pieces and not settings.languages:
        raise UserError(
            f"no new token stands {settings.minimum_frequency} times in the data. Give more text, or a lower"
            " minimum_frequency."
        )
    extended = add_new_tokens(tokenizer, new)
    unseen = list(islice(filter(is_held_out, texts()), TEXTS_MEASURED)) or list(islice(texts(), TEXTS_MEASURED))
    reports = {
        when: tokenizer_report(which, ((script_of(text), text) for text in unseen))
        for when, which in (("before", tokenizer), ("after", extended))
    }
    extended.save_pretrained(out)
    for name in MODEL_CONFIGS:  # `diptych prepare` reads in them which token decoders start with
        missing = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        if (path := cached_file(settings.checkpoint, name, **missing)) is not None:
            (out / name).write_bytes(Path(path).read_bytes())
    _write_report({"new_tokens": len(new.pieces), **reports}, out / REPORT)
    print(_gain_lines(reports, len(new.pieces), settings))


def _languages_alike(entries: Sequence[str]) -> dict[str, str]:
    for entry in entries:
        if not all(entry.partition("=")):
            raise UserError(f"languages has {entry!r}. Give a new code and one that is like it: jje_Hang=kor_Hang.")
    return dict(entry.split("=", 1) for entry in entries)


def _gain_lines(reports: dict[str, Any], added: int, settings: ExtendTokenizerSettings) -> str:
    lines = [f"{added:,} tokens added. Unseen text:   tokens/word  bytes/token  unknown  come back"]
    width = lines[0].index("tokens/word")
    for when, found in reports.items():
        total = found["total"]
        cells = f"{total['tokens_per_word'] or 0:11.2f}  {total['bytes_per_token'] or 0:11.2f}"
        lines.append(f"{when:{width}}{cells}  {total['unknown_rate'] or 0:7.2%}  {total['exact_rate'] or 0:9.1%}")
    lines += ["", "Next:", f"      diptych prepare --tokenizer {settings.out} …"]
    return "\n".join([*lines, f"      diptych train --model {settings.checkpoint} --grow_vocabulary true …"])


def _write_report(found: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(found, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _is_report(content: bytes) -> bool:
    try:
        return {"tokenizer", "languages", "total"} <= json.loads(content).keys()
    except (ValueError, AttributeError):
        return False


ACTIONS = {TrainTokenizerSettings: train, ReportTokenizerSettings: report, ExtendTokenizerSettings: extend}
