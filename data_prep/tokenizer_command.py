"""`diptych tokenizer`: train a tokenizer, report on one, or extend a checkpoint's with tokens for new texts.

    diptych tokenizer train --data en.txt ko.txt --out my-tokenizer
    diptych tokenizer report google-t5/t5-small --data en.txt ko.txt --out report.json
    diptych tokenizer extend my-checkpoint --data my.ko.txt --tokens 2000 --out my-checkpoint-ko

Data are whatever `diptych prepare` reads, in its formats, plain text (a text a line), and folders that it wrote (the
texts of the train split): see tokenizer_texts.py. Exit codes: 0 done, 2 with one message when a person has to mend
something first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import transformers
from transformers.utils import cached_file

from diptych.data_prep.arguments import parse
from diptych.data_prep.checkpoint_tokenizer import open_tokenizer
from diptych.data_prep.extend_tokenizer import MINIMUM_FREQUENCY, add_new_tokens, check_extensible, learn_new_tokens
from diptych.data_prep.filters import script_of
from diptych.data_prep.records import UserError, nearest
from diptych.data_prep.tokenizer_report import draw_report, report_of_pairs, table_of
from diptych.data_prep.tokenizer_texts import Texts, open_texts
from diptych.data_prep.train_tokenizer import (
    LEAST_SAVING,
    CurvePoint,
    curve_vocab_size,
    is_held_out,
    table_vocab_size,
    train_tokenizer,
    why_fewer,
)

REPORT_JSON, REPORT_PNG = "tokenizer_report.json", "tokenizer_report.png"
MODEL_CONFIGS = ("config.json", "generation_config.json")
TEXTS_MEASURED = 20_000
"""Held-out texts on which an extension is measured, at most."""


@dataclass(frozen=True)
class TrainTokenizerSettings:
    """Train a byte-level tokenizer, from which every text comes back exactly."""

    data: list[str] = field(default_factory=list)
    """What to learn from, one or more: all that `diptych prepare` reads (files, folders, globs, Hub data sets), files
    of plain text (a text a line), folders of prepared data (their train split)."""
    out: str = "tokenizer"
    """Folder to write: the tokenizer, with tokenizer_report.json and tokenizer_report.png."""
    kind: Literal["bpe", "unigram"] = "bpe"
    """How words are cut: byte pair encoding, or the most probable pieces (Unigram)."""
    vocab_size: int | Literal["auto", "table"] = "auto"
    """Tokens. `auto` trains sizes that double and takes the smallest after which a doubling saves too little; `table`
    goes by the amount of text; or a number."""
    least_saving: float = LEAST_SAVING
    """For auto: a doubling of the vocabulary has to save at least this part of the tokens of unseen text."""
    text_fields: list[str] = field(default_factory=list)
    """Columns of rows that are text, `answers.text` for one inside another. Default: the texts of the format that is
    recognised, or the column text."""


@dataclass(frozen=True)
class ReportTokenizerSettings:
    """Report how many tokens texts take, whether they come back exactly, and how much of the vocabulary is used."""

    tokenizer: str
    """A tokenizer or checkpoint, as a folder or a Hub id."""
    data: list[str] = field(default_factory=list)
    """What to measure on, one or more: all that `diptych prepare` reads, files of plain text (a text a line), folders
    of prepared data (their train split)."""
    by: Literal["script", "language", "file"] = "script"
    """What the rows of the table are: the script of most letters, the language as py3langid guesses it (needs the
    extra `clean`), or the file."""
    out: str | None = None
    """Also write the report as JSON to this file, and its bars as a PNG beside it."""
    text_fields: list[str] = field(default_factory=list)
    """Columns of rows that are text, `answers.text` for one inside another. Default: the texts of the format that is
    recognised, or the column text."""


@dataclass(frozen=True)
class ExtendTokenizerSettings:
    """Add tokens for a new language or domain to a checkpoint's tokenizer, whose old tokens keep their ids."""

    checkpoint: str
    """The checkpoint whose tokenizer is extended, as a folder or a Hub id."""
    data: list[str] = field(default_factory=list)
    """Texts of the new language or domain, one or more: all that `diptych prepare` reads, files of plain text (a text
    a line), folders of prepared data (their train split). One text in twenty is held out to measure on."""
    tokens: int = 2000
    """New tokens, at most. Each costs a row of the embedding table, and of the head where that has its own; training
    (with grow_vocabulary) starts it as the mean of the rows that it stands for."""
    out: str = "extended-tokenizer"
    """Folder to write: the tokenizer, with what it gains in tokenizer_report.json. Use it as prepare's --tokenizer."""
    minimum_frequency: int = MINIMUM_FREQUENCY
    """A new token stands at least so often in the data: a rarer one would have nothing to learn from."""
    text_fields: list[str] = field(default_factory=list)
    """Columns of rows that are text, `answers.text` for one inside another. Default: the texts of the format that is
    recognised, or the column text."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    action, *rest = argv
    try:
        if action not in ACTIONS:
            near = nearest(action, ACTIONS)
            hint = f"Did you mean {near}? " if near else ""
            raise UserError(f"there is no action {action!r}. {hint}Choose from: {', '.join(ACTIONS)}.")
        settings_class, run, _ = ACTIONS[action]
        run(parse(settings_class, f"diptych tokenizer {action}", rest))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _usage() -> str:
    lines = [f"  {action:8}{summary}" for action, (_, _, summary) in ACTIONS.items()]
    return "\n".join(
        [
            "usage: diptych tokenizer ACTION ...",
            "",
            *lines,
            "",
            "`diptych tokenizer ACTION --help` says what it takes.",
        ]
    )


def train(settings: TrainTokenizerSettings) -> None:
    out = _new_folder(settings.out)
    texts = open_texts(settings.data, settings.text_fields)
    size, curve = settings.vocab_size, []
    if size == "auto":
        size, curve = curve_vocab_size(settings.kind, texts, settings.least_saving)
        print(_curve_lines(curve, size))
    elif size == "table":
        characters = sum(map(len, texts()))
        size = table_vocab_size(characters)
        print(f"{characters:,} characters of text: {size:,} tokens.")
    tokenizer = train_tokenizer(settings.kind, texts(), size)
    tokenizer.name_or_path = settings.out
    report = report_of_pairs(tokenizer, ((script_of(text), text) for text in texts()))
    _warn_of_rejects(texts)
    if fewer := why_fewer(settings.kind, tokenizer, size):
        print(f"warning: {fewer}", file=sys.stderr)
    if curve:
        report |= {"vocab_size_curve": [asdict(point) for point in curve], "vocab_size_chosen": size}
    tokenizer.save_pretrained(out)
    _write_report(report, out / REPORT_JSON)
    print(table_of(report))


def _curve_lines(curve: Sequence[CurvePoint], size: int) -> str:
    lines = ["vocabulary  tokens/word  bytes/token  saves"]
    for point in curve:
        saving = "" if point.saving is None else f"{point.saving:.1%}"
        chosen = "  chosen" if point.vocab_size == size else ""
        figures = f"{point.vocab_size:10,}  {point.tokens_per_word:11.2f}  {point.bytes_per_token:11.2f}"
        lines.append(f"{figures}  {saving:>5}{chosen}".rstrip())
    return "\n".join([*lines, ""])


def report(settings: ReportTokenizerSettings) -> None:
    tokenizer = open_tokenizer(settings.tokenizer)
    label = {"script": script_of, "language": _guess_language, "file": None}[settings.by]
    texts = open_texts(settings.data, settings.text_fields)
    found = report_of_pairs(tokenizer, ((label(text) if label else file, text) for file, text in texts.pairs()))
    _warn_of_rejects(texts)
    print(table_of(found))
    if settings.out is not None:
        path = Path(settings.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_report(found, path if path.suffix == ".json" else path.with_name(f"{path.name}.json"))


def _guess_language(text: str) -> str:
    try:
        import py3langid
    except ImportError:
        raise UserError("by language needs py3langid: pip install 'diptych[clean]'. Or use by script.") from None
    return py3langid.classify(text)[0]


def extend(settings: ExtendTokenizerSettings) -> None:
    if settings.tokens < 1:
        raise UserError(f"tokens is {settings.tokens}; at least 1 token is added.")
    out = _new_folder(settings.out)
    tokenizer = open_tokenizer(settings.checkpoint)
    check_extensible(tokenizer)
    texts = open_texts(settings.data, settings.text_fields)
    new = learn_new_tokens(
        tokenizer,
        lambda: (text for text in texts() if not is_held_out(text)),
        settings.tokens,
        settings.minimum_frequency,
    )
    _warn_of_rejects(texts)
    if not new.pieces:
        raise UserError(
            f"no new token stands {settings.minimum_frequency} times in the data. Give more text, or a lower"
            " minimum_frequency."
        )
    extended = add_new_tokens(tokenizer, new)
    unseen = list(islice(filter(is_held_out, texts()), TEXTS_MEASURED)) or list(islice(texts(), TEXTS_MEASURED))
    reports = {
        when: report_of_pairs(which, ((script_of(text), text) for text in unseen))
        for when, which in (("before", tokenizer), ("after", extended))
    }
    extended.save_pretrained(out)
    _copy_configs(settings.checkpoint, out)
    (out / REPORT_JSON).write_text(_as_json({"new_tokens": len(new.pieces), **reports}), encoding="utf-8")
    print(_gain_lines(reports, len(new.pieces), settings))


def _gain_lines(reports: dict[str, Any], added: int, settings: ExtendTokenizerSettings) -> str:
    lines = [f"{added:,} tokens added. Unseen text:   tokens/word  bytes/token  unknown  come back"]
    width = lines[0].index("tokens/word")
    for when, found in reports.items():
        total = found["total"]
        cells = f"{total['tokens_per_word'] or 0:11.2f}  {total['bytes_per_token'] or 0:11.2f}"
        lines.append(f"{when:{width}}{cells}  {total['unknown_rate'] or 0:7.2%}  {total['exact_rate'] or 0:9.1%}")
    return "\n".join([*lines, "", "Next:", *_next_commands(settings)])


def _next_commands(settings: ExtendTokenizerSettings) -> list[str]:
    prepare = f"      diptych prepare --tokenizer {settings.out} …"
    if _has_weights(settings.checkpoint):
        return [prepare, f"      diptych train --model {settings.checkpoint} --grow_vocabulary true …"]
    return [
        prepare,
        "      diptych train --model CHECKPOINT --grow_vocabulary true …",
        f"{settings.checkpoint} has no weights to train (*.safetensors): CHECKPOINT is the model that this tokenizer",
        "belongs to, or a named size such as diptych-60m for a new one, which needs no grow_vocabulary.",
    ]


def _has_weights(checkpoint: str) -> bool:
    folder = Path(checkpoint)
    return not folder.is_dir() or any(folder.glob("*.safetensors"))


def _copy_configs(checkpoint: str, out: Path) -> None:
    """`diptych prepare` reads there which token decoders start with."""
    for name in MODEL_CONFIGS:
        path = cached_file(
            checkpoint,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is not None:
            (out / name).write_bytes(Path(path).read_bytes())


def _new_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(f"{name} has something in it, which will not be overwritten. Choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _warn_of_rejects(texts: Texts) -> None:
    if left_out := texts.left_out():
        print(f"warning: {left_out}", file=sys.stderr)


def _write_report(found: dict[str, Any], path: Path) -> None:
    path.write_text(_as_json(found), encoding="utf-8")
    draw_report(found, path.with_suffix(".png"))


def _as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


ACTIONS = {
    "train": (TrainTokenizerSettings, train, "texts -> a tokenizer that gives every text back"),
    "report": (ReportTokenizerSettings, report, "a tokenizer and texts -> how many tokens they take"),
    "extend": (ExtendTokenizerSettings, extend, "a checkpoint and new texts -> its tokenizer with tokens for them"),
}

if __name__ == "__main__":
    sys.exit(main())
