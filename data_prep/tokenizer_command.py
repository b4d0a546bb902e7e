"""`diptych tokenizer`: train a tokenizer, report on one, or extend a checkpoint's with tokens for new texts.

    diptych tokenizer train --data en.txt ko.txt --out my-tokenizer
    diptych tokenizer report google-t5/t5-small --data en.txt ko.txt --out report.json
    diptych tokenizer extend my-checkpoint --data my.ko.txt --tokens 2000 --out my-checkpoint-ko

Data are text files (a text a line), .jsonl files (their text fields), and folders that `diptych prepare` wrote (the
texts of the train split). Exit codes: 0 done, 2 with one message when a person has to mend something first.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import transformers
from jsonargparse import ArgumentParser, set_parsing_settings
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from diptych.data_prep.extend_tokenizer import MINIMUM_FREQUENCY, add_new_tokens, check_extensible, learn_new_tokens
from diptych.data_prep.filters import script_of
from diptych.data_prep.records import UserError, nearest
from diptych.data_prep.tokenizer_report import draw_report, report_of_pairs, table_of
from diptych.data_prep.train_tokenizer import (
    LEAST_SAVING,
    CurvePoint,
    curve_vocab_size,
    is_held_out,
    table_vocab_size,
    train_tokenizer,
)

NO_PLAIN_TEXT = (".json", ".csv", ".tsv", ".tmx", ".parquet", ".arrow", ".gz", ".zst")
TEXT_FIELDS = ("instruction", "input", "output", "prompt", "completion", "source", "target", "text")
REPORT_JSON, REPORT_PNG = "tokenizer_report.json", "tokenizer_report.png"
MODEL_CONFIGS = ("config.json", "generation_config.json")
TEXTS_MEASURED = 20_000
"""Held-out texts on which an extension is measured, at most."""


@dataclass(frozen=True)
class TrainTokenizerSettings:
    """Train a byte-level tokenizer, from which every text comes back exactly."""

    data: list[str] = field(default_factory=list)
    """What to learn from, one or more: text files (a text a line), .jsonl files, folders of prepared data (their train
    split)."""
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
    """Fields of .jsonl rows that are text. Default: those of instruction, input, output, prompt, completion, source,
    target and text that are there."""


@dataclass(frozen=True)
class ReportTokenizerSettings:
    """Report how many tokens texts take, whether they come back exactly, and how much of the vocabulary is used."""

    tokenizer: str
    """A tokenizer or checkpoint, as a folder or a Hub id."""
    data: list[str] = field(default_factory=list)
    """What to measure on, one or more: text files (a text a line), .jsonl files, folders of prepared data."""
    by: Literal["script", "language", "file"] = "script"
    """What the rows of the table are: the script of most letters, the language as py3langid guesses it (needs the
    extra `clean`), or the file."""
    out: str | None = None
    """Also write the report as JSON to this file, and its bars as a PNG beside it."""
    text_fields: list[str] = field(default_factory=list)
    """Fields of .jsonl rows that are text. Default: those of instruction, input, output, prompt, completion, source,
    target and text that are there."""


@dataclass(frozen=True)
class ExtendTokenizerSettings:
    """Add tokens for a new language or domain to a checkpoint's tokenizer, whose old tokens keep their ids."""

    checkpoint: str
    """The checkpoint whose tokenizer is extended, as a folder or a Hub id."""
    data: list[str] = field(default_factory=list)
    """Texts of the new language or domain, one or more: text files (a text a line), .jsonl files, folders of prepared
    data (their train split). One text in twenty is held out to measure on."""
    tokens: int = 2000
    """New tokens, at most. Each costs a row of the embedding table, and of the head where that has its own; training
    (with grow_vocabulary) starts it as the mean of the rows that it stands for."""
    out: str = "extended-tokenizer"
    """Folder to write: the tokenizer, with what it gains in tokenizer_report.json. Use it as prepare's --tokenizer."""
    minimum_frequency: int = MINIMUM_FREQUENCY
    """A new token stands at least so often in the data: a rarer one would have nothing to learn from."""
    text_fields: list[str] = field(default_factory=list)
    """Fields of .jsonl rows that are text. Default: those of instruction, input, output, prompt, completion, source,
    target and text that are there."""


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
        run(_parse(settings_class, f"diptych tokenizer {action}", rest))
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
    texts = _texts(settings.data, settings.text_fields)
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
    tokenizer = _load(settings.tokenizer)
    label = {"script": script_of, "language": _guess_language, "file": None}[settings.by]
    by_file = ((name, _texts([name], settings.text_fields)) for name in settings.data or _texts([], []))
    pairs = ((label(text) if label else name, text) for name, texts in by_file for text in texts())
    found = report_of_pairs(tokenizer, pairs)
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
    tokenizer = _load(settings.checkpoint)
    check_extensible(tokenizer)
    texts = _texts(settings.data, settings.text_fields)
    new = learn_new_tokens(
        tokenizer,
        lambda: (text for text in texts() if not is_held_out(text)),
        settings.tokens,
        settings.minimum_frequency,
    )
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
    return "\n".join(
        [
            *lines,
            "",
            f"Next: diptych prepare --tokenizer {settings.out} …",
            f"      diptych train --model {settings.checkpoint} --grow_vocabulary true …",
        ]
    )


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


def _load(name: str) -> PreTrainedTokenizerBase:
    if not Path(name).is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"the tokenizer '{name}' is a path, and there is no such folder. Mend it, or name a Hub id.")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the tokenizer '{name}' could not be loaded: {error}") from error


def _new_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(f"{name} has something in it, which will not be overwritten. Choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_report(found: dict[str, Any], path: Path) -> None:
    path.write_text(_as_json(found), encoding="utf-8")
    draw_report(found, path.with_suffix(".png"))


def _as_json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _texts(names: Sequence[str], text_fields: Sequence[str]) -> Callable[[], Iterator[str]]:
    """A function that reads all texts, as often as it is called. That the files are there is checked now."""
    if not names:
        raise UserError("nothing to read: give --data FILE, more files, or a folder of prepared data.")
    for name in names:
        if not Path(name).exists():
            raise UserError(f"there is no file or folder {name}.")
    return lambda: (text for name in names for text in _read(Path(name), text_fields or TEXT_FIELDS) if text)


def _read(path: Path, text_fields: Sequence[str]) -> Iterable[str]:
    if path.is_dir():
        return _prepared_texts(path)
    if path.suffix.lower() in NO_PLAIN_TEXT:
        raise UserError(
            f"{path} is no plain text, and its syntax would be learned with it. Prepare it (diptych prepare --data"
            f" {path} …), and name the folder that this writes."
        )
    return _jsonl_texts(path, text_fields) if path.suffix in (".jsonl", ".ndjson") else _lines(path)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            for line in file:
                yield line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error.reason}. Save it as UTF-8.") from None


def _jsonl_texts(path: Path, text_fields: Sequence[str]) -> Iterator[str]:
    found_any = False
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = [row[name] for name in text_fields if isinstance(row.get(name), str)]
            "".join(texts).encode()
        except (ValueError, AttributeError, RecursionError) as error:  # no object has no .get
            raise UserError(f"{path}:{number} is no JSON object with text: {error}. Mend or remove it.") from None
        found_any = found_any or bool(texts)
        yield from texts
    if not found_any:
        raise UserError(
            f"{path} has none of the fields {', '.join(text_fields)}. Name its text fields with --text_fields."
        )


def _prepared_texts(folder: Path) -> Iterator[str]:
    try:
        split = datasets.load_from_disk(str(folder))["train"]
        columns = [split[name] for name in ("source", "target")]
    except (OSError, KeyError) as error:
        raise UserError(
            f"{folder} is no folder that diptych prepare wrote, with a train split: {error}. Name files instead."
        ) from None
    for column in columns:
        yield from column


def _parse(settings_class: type, command: str, argv: Sequence[str]) -> Any:
    """A field's docstring is its --help text. Lists take words up to the next option: `--data a.txt b.txt`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=command, description=settings_class.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings.")
    parser.add_class_arguments(settings_class, as_positional=True)
    try:
        values = parser.parse_args(_spell_out(argv)).as_dict()
    except ArgumentError as error:
        raise UserError(f"{' '.join(str(error).split()).rstrip('.')}.{_hint(settings_class, str(error))}") from None
    return settings_class(**{setting.name: values[setting.name] for setting in fields(settings_class)})


def _spell_out(argv: Sequence[str]) -> list[str]:
    """`--data a b --tokens 9` as jsonargparse reads it: `--tokens 9 --data=["a", "b"]`."""
    lists: dict[str, list[str]] = {}
    others, current = [], None
    for word in argv:
        option, equals, value = word.partition("=")
        if option in ("--data", "--text_fields"):
            current = lists.setdefault(option, [])
            current.extend([value] if equals else [])
        elif word.startswith("-"):
            current = None
            others.append(word)
        else:
            (others if current is None else current).append(word)
    return [*others, *(f"{option}={json.dumps(words)}" for option, words in lists.items())]


def _hint(settings_class: type, message: str) -> str:
    for word in message.replace("'", " ").replace("=", " ").split():
        near = nearest(word.lstrip("-"), [setting.name for setting in fields(settings_class)])
        if word.startswith("--") and near:
            return f" Did you mean --{near}?"
    return " See --help."


ACTIONS = {
    "train": (TrainTokenizerSettings, train, "texts -> a tokenizer that gives every text back"),
    "report": (ReportTokenizerSettings, report, "a tokenizer and texts -> how many tokens they take"),
    "extend": (ExtendTokenizerSettings, extend, "a checkpoint and new texts -> its tokenizer with tokens for them"),
}

if __name__ == "__main__":
    sys.exit(main())
