"""The settings of `diptych tokenizer` and `diptych denoise`, which take plain texts as well as rows: the docstrings of
their fields are the text of --help.

Nothing heavy is imported here, so that --help and mistakes are answered at once.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from diptych.data_prep.command_line.arguments import check_numbers, choose_from, parse
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import CHECKPOINT, NAMED, OUTPUT, SOURCE
from diptych.data_prep.text_to_ids.train_tokenizer import LEAST_SAVING


@dataclass(frozen=True)
class TrainTokenizerSettings:
    """Train a byte-level tokenizer, which decodes every text exactly."""

    data: list[str] = field(default_factory=list, metadata=SOURCE)
    """Training data, one or more sources: all that `diptych prepare` reads (files, folders, globs, Hub data sets),
    files of plain text (one text per line), folders of prepared data (their train split)."""
    out: str = field(default="tokenizer", metadata=OUTPUT)
    """Folder to write: the tokenizer, with tokenizer_report.json."""
    kind: Literal["bpe", "unigram"] = "bpe"
    """How words are split: byte pair encoding, or the most probable pieces (Unigram)."""
    vocab_size: int | Literal["auto"] = "auto"
    """Vocabulary size. `auto` tries sizes that double, and takes the smallest for which doubling saves too little."""
    least_saving: float = LEAST_SAVING
    """For auto: the part of the tokens of held-out text that a doubling must save."""
    text_fields: list[str] = field(default_factory=list)
    """Columns with text, `answers.text` for a nested one. Default: the texts of the recognised format, or the column
    `text`."""


@dataclass(frozen=True)
class ReportTokenizerSettings:
    """Report how many tokens texts take, whether they come back exactly, and how much of the vocabulary is used."""

    tokenizer: str = field(metadata=CHECKPOINT)
    """A tokenizer or checkpoint, as a folder or a Hub id."""
    data: list[str] = field(default_factory=list, metadata=SOURCE)
    """Texts to measure, one or more sources: all that `diptych prepare` reads, files of plain text (one text per
    line), folders of prepared data (their train split)."""
    by: Literal["script", "language", "file"] = "script"
    """The rows of the table: the script of most letters, the language that py3langid detects (needs the extra
    `clean`), or the file."""
    out: str | None = field(default=None, metadata=OUTPUT)
    """Also write the report as JSON to this file."""
    text_fields: list[str] = field(default_factory=list)
    """Columns with text, `answers.text` for a nested one. Default: the texts of the recognised format, or the column
    `text`."""


@dataclass(frozen=True)
class ExtendTokenizerSettings:
    """Add tokens for a new language or domain to a checkpoint's tokenizer, whose old tokens keep their ids."""

    checkpoint: str = field(metadata=CHECKPOINT)
    """The checkpoint whose tokenizer is extended, as a folder or a Hub id."""
    data: list[str] = field(default_factory=list, metadata=SOURCE)
    """Texts of the new language or domain, one or more sources: all that `diptych prepare` reads, files of plain text
    (one text per line), folders of prepared data (their train split). 5 % of the texts are held out to measure."""
    tokens: int = 2000
    """Maximum number of new tokens. Each adds a row to the embedding table, and to an untied head; in training (with
    grow_vocabulary) it starts as the mean of the rows of the tokens that it replaces."""
    languages: list[str] = field(default_factory=list, metadata=NAMED)
    """New language codes, each with the code of a language that is like it, as which it starts in training:
    `--languages jje_Hang=kor_Hang`. For tokenizers with language codes, such as NLLB's."""
    out: str = field(default="extended-tokenizer", metadata=OUTPUT)
    """Folder to write: the tokenizer, with what it gains in tokenizer_report.json. Use it as prepare's --tokenizer."""
    minimum_frequency: int = 5
    """Minimum frequency of a new token in the data; rarer tokens would be trained too little."""
    text_fields: list[str] = field(default_factory=list)
    """Columns with text, `answers.text` for a nested one. Default: the texts of the recognised format, or the column
    `text`."""


TOKENIZER_ACTIONS = {
    "train": (TrainTokenizerSettings, "texts -> a byte-level tokenizer"),
    "report": (ReportTokenizerSettings, "a tokenizer and texts -> how many tokens they take"),
    "extend": (ExtendTokenizerSettings, "a checkpoint and new texts -> its tokenizer with tokens for them"),
}
TOKENIZER_USAGE = """usage: diptych tokenizer ACTION ...

{actions}

`diptych tokenizer ACTION --help` says what it takes."""


def parse_tokenizer_settings(
    argv: Sequence[str],
) -> TrainTokenizerSettings | ReportTokenizerSettings | ExtendTokenizerSettings:
    """Of the action that is named first. Raises UserError for what cannot be meant, SystemExit after the usage."""
    if not argv or argv[0] in ("-h", "--help"):
        actions = "\n".join(f"  {action:8}{summary}" for action, (_, summary) in TOKENIZER_ACTIONS.items())
        print(TOKENIZER_USAGE.format(actions=actions), file=sys.stdout if argv else sys.stderr)
        raise SystemExit(0 if argv else 2)
    action, *words = argv
    if action not in TOKENIZER_ACTIONS:
        raise UserError(f"there is no action {action!r}. {choose_from(action, list(TOKENIZER_ACTIONS))}")
    settings, _ = TOKENIZER_ACTIONS[action]
    return parse(settings, f"diptych tokenizer {action}", words)


NOISE_RANGES = {
    "above 0 and below 1": (lambda value: 0 < value < 1, "noise_density"),
    "above 0 and at most 0.5": (lambda value: 0 < value <= 0.5, "minimum_prefix"),
    "1 or more": (lambda value: value >= 1, "mean_noise_span_length"),
}


@dataclass(frozen=True)
class DenoiseSettings:
    """Make pairs of source and target out of raw text, as rows of token ids that `diptych prepare` packs."""

    data: list[str] = field(default_factory=list, metadata=SOURCE)
    """Files of text: .txt with one document per line, rows with a column `text` or of any known format (jsonl,
    parquet, also .gz and .zst), folders, globs, and Hub ids (hf:user/name)."""
    tokenizer: str = field(default="", metadata=CHECKPOINT)
    """Checkpoint with the tokenizer to use: folder or Hub id."""
    out: str = field(default="", metadata=OUTPUT)
    """New folder, for pairs.parquet, and for the tokenizer if sentinels are added to it."""
    objective: Literal["prefix_lm", "span_corruption", "ul2"] = "prefix_lm"
    """prefix_lm needs no new tokens, and is the objective of an LLM; the others need sentinels."""
    noise_density: float = 0.15
    """span_corruption: share of the tokens that are masked."""
    mean_noise_span_length: float = 3.0
    """span_corruption: mean length of a masked span in tokens."""
    minimum_prefix: float = 0.25
    """prefix_lm: minimum share of a window that is the source; the target has at least the same share. Not for UL2."""
    max_source_tokens: int = 512
    """The longest source, including special tokens."""
    max_target_tokens: int = 512
    """The longest target."""
    text_fields: list[str] = field(default_factory=list)
    """Columns with text, if they are not recognised."""
    documents: Literal["line", "file"] = "line"
    """Whether each line of a .txt is a document, or each file (blank lines are removed)."""
    add_sentinels: int = 0
    """Add so many sentinels <extra_id_0>, <extra_id_1> … to the tokenizer, and save it in OUT/tokenizer."""
    mode_tokens: list[str] = field(default_factory=list)
    """ul2: three tokens of the tokenizer, for R, S and X, at the start of a source."""
    seed: int = 0
    """Seed of all random choices."""

    def __post_init__(self):
        for name, example in {"tokenizer": "a checkpoint", "out": "a new folder"}.items():
            if not getattr(self, name):
                raise UserError(f"{name} is not set. Name {example}: --{name} …")
        check_numbers(self, NOISE_RANGES)
        if self.mode_tokens and (self.objective != "ul2" or len(self.mode_tokens) != 3):
            raise UserError("mode_tokens are three, for R, S and X, of objective ul2. Give them so, or none.")
