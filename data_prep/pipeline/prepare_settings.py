"""The settings of `diptych prepare`, `denoise` and `tokenizer`: the docstrings of their fields are the text of --help.

diptych prepare --config prepare.yaml --data a.json b.json --strict
→ PrepareSettings(data=["a.json", "b.json"], strict=True, …)     the command line goes before the file

Nothing heavy is imported here, so that --help and mistakes are answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from diptych.data_prep.cleaning.filters import LengthFilter
from diptych.data_prep.cleaning.mixture import Mixture
from diptych.data_prep.command_line.arguments import choose_from, parse
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.places import CHECKPOINT, NAMED_SOURCE, OUTPUT, SOURCE, TEMPLATE
from diptych.data_prep.rows.convert_rows import SUMMARY_INSTRUCTION
from diptych.data_prep.rows.named_splits import HELD_OUT
from diptych.data_prep.text_to_ids.train_tokenizer import LEAST_SAVING, MINIMUM_VOCAB_SIZE

USAGE = "diptych prepare --data SOURCE ... --tokenizer CHECKPOINT [--out FOLDER] [settings]"
SECTIONS = {
    "data": "what is read",
    "out": "what is written, and for which checkpoint",
    "max_source_tokens": "lengths",
    "deduplicate": "cleaning",
    "packing": "packing",
    "validation": "splits",
    "workers": "how it is run",
}
"""The headings of --help, each by the setting that it stands above."""

MOST_TASKS = 99_999

USUAL_FRACTION = 0.05
OF_TRAIN_ALONE = (
    *("mixture", "train_tokenizer", "near_duplicates", "decontaminate", "lengths", "source_languages"),
    *("target_languages", "packed_source_tokens", "packed_target_tokens", "share_sources", "on_both_sides"),
    *("validation_fraction", "test_fraction", "split_by"),
)
"""Settings that say nothing where there is only an evaluation set."""


@dataclass(frozen=True)
class PrepareSettings:
    """From files of instruction rows or parallel text to a checked, tokenised and packed dataset."""

    data: list[str] = field(default_factory=list, metadata=SOURCE)
    """What to read, one or more: files (.json, .jsonl, .csv, .tsv, .tmx, .parquet, .arrow; text also as .gz or .zst),
    folders, globs, shipped samples (tatoeba, cmudict, seed_tasks), Hub data sets (hf:user/name, hf:user/name:split),
    two aligned files (a.en+a.ko). In a folder, a saved DatasetDict or a Hub data set, the names train, valid, dev,
    test and their like say which split a part is."""

    aligned: list[str] = field(default_factory=list, metadata=SOURCE)
    """Two text files of parallel text, where line N of one belongs to line N of the other."""

    format: str | None = None
    """What the rows are: alpaca, dolly, prompt_completion, messages, sharegpt, natural_instructions, self_instruct,
    parallel, summarisation, tokenised. Default: recognised from the first rows of each source, and said."""

    map: list[str] = field(default_factory=list)
    """Columns that have other names in the data, the known name first: `--map output=answer instruction=q.text`. Where
    all are numbers, csv and tsv files have no header: `--map instruction=1 output=2`."""

    forward: str | None = None
    """Instruction for parallel text from the first side to the second, such as 'Translate English to Korean:'; '' for
    models that need none, because they have language codes. Without it, that direction gives no rows; shipped samples
    bring their own for both, if neither is given."""

    backward: str | None = None
    """Instruction for parallel text from the second side to the first."""

    languages: list[str] = field(default_factory=list)
    """Which two languages of parallel text with more are the first and the second side: `--languages en ko`. Where a
    row has no `en`, this is `EN`, or each of its regions: `en-GB`, `en_US`."""

    summary_instruction: str = SUMMARY_INSTRUCTION
    """The instruction of summarisation pairs."""

    positive_examples: int = 0
    """How many of the worked examples that a Natural Instructions task has are told in its instruction."""

    negative_examples: int = 0
    """How many of its wrong answers are told."""

    mixture: Mixture | None = None
    """How several sources are mixed in the train split. Default: every row once."""

    out: str = field(default="prepared", metadata=OUTPUT)
    """Folder to write. Replaced if it holds an older prepared dataset and nothing else."""

    template: str | None = field(default=None, metadata=TEMPLATE)
    """How a row becomes source text and target text: alpaca, plain, chat, translate, or a Jinja file. Default: the
    template that the tokenizer carries, else chat for conversations and alpaca for all else."""

    tokenizer: str | None = field(default=None, metadata=CHECKPOINT | {"instead_of": ("train_tokenizer",)})
    """An existing tokenizer, as a folder or a Hub id: the one of the checkpoint that will be fine-tuned."""

    train_tokenizer: Literal["bpe", "unigram"] | None = field(default=None, metadata={"instead_of": ("tokenizer",)})
    """Train a tokenizer on the train split instead: bpe or unigram."""

    vocab_size: int | Literal["auto", "table"] = 8000
    """Tokens of a trained tokenizer. More makes texts shorter and the model larger. auto: as many as still shorten
    texts by a tenth when they are doubled; table: by the amount of text."""

    source_language: str | None = None
    """Language of the sources, of parallel text that of the first side: a code of the tokenizer (NLLB: eng_Latn,
    mBART: en_XX, M2M100: en), or a short one where that is clear (en). Rows may bring their own: source_language,
    src_lang. For a tokenizer without codes, rows without an instruction begin `translate English to Korean:`."""

    target_language: str | None = None
    """Language of the targets, of parallel text that of the second side. Rows may bring their own: target_language,
    tgt_lang."""

    max_source_tokens: int = 512
    """Longest source, the tokenizer's end token included."""

    max_target_tokens: int = 512
    """Longest target, its eos token included."""

    too_long: Literal["drop", "cut", "error"] = "drop"
    """What becomes of a row with a longer side: drop it (counted, and listed in rejects.jsonl), cut it, or error.
    A target loses its end; a source the ends of its longest fields, and keeps all that the template says."""

    end_cut_targets: bool = False
    """Whether a target that was cut still ends in eos. A model that learns from such targets stops in mid-sentence."""

    lossy_text: Literal["keep", "drop", "error"] = "keep"
    """What becomes of a row of which the tokenizer loses something, such as line breaks of code (T5), capital letters
    (BERT) or characters that it does not know: keep it (counted, with an example), drop it, or error."""

    deduplicate: bool = True
    """Remove rows whose source and target repeat an earlier row's."""

    near_duplicates: float | None = None
    """Also remove rows that share at least this part of their shingles with an earlier row (Jaccard similarity, by
    MinHash), such as 0.8."""

    shingle: Literal["characters", "words"] = "characters"
    """What near duplicates are compared by: runs of characters or words."""

    shingle_size: int = 0
    """Characters or words in a run; 0 is 5 characters or 2 words. 3 characters suit short sentences."""

    decontaminate: list[str] = field(default_factory=list, metadata=SOURCE)
    """Files with texts that training must not hold, such as evaluation sets, as --data has them or as .txt with a text
    a line: rows that share a run of words with them are removed."""

    decontaminate_ngram: int = 13
    """Words of such a run; texts with fewer count from 8 on, or as a whole."""

    lengths: LengthFilter | None = None
    """Bounds on the length of source and target, and on their ratio, in characters or words."""

    source_languages: list[str] = field(default_factory=list)
    """Keep rows whose source is in one of these languages (codes such as en, ko). Needs the extra `clean`."""

    target_languages: list[str] = field(default_factory=list)
    """Keep rows whose target is in one of these languages."""

    language_confidence: float = 0.7
    """How sure it has to be that a text is in another language. Short texts seldom reach it, and stay."""

    sensitive: bool = False
    """Look for e-mail addresses, phone and card numbers, keys and passwords, and report them, masked. Nothing is
    changed or removed. Needs the extra `clean`."""

    packing: bool = True
    """Also write the train split as packed rows, several examples in each, which train without padding; false writes
    examples alone."""

    packed_source_tokens: int | None = None
    """Source tokens of a packed row, at least those of the longest source. Default: chosen, with its counterpart, such
    that rows are short and full."""

    packed_target_tokens: int | None = None
    """Target tokens of a packed row, at least those of the longest target. Default: chosen likewise."""

    share_sources: bool = False
    """Encode equal sources of a packed row once, for all their targets: for data with several targets to a source."""

    decoder_start_token_id: int | None = None
    """The first decoder input of every packed example. Default: what the checkpoint's config says, else the padding
    token, as T5 and Diptych have it."""

    validation: list[str] = field(default_factory=list, metadata=NAMED_SOURCE)
    """A validation set of your own, to look at during training: what --data takes. Several sets have names:
    `--validation news=a.jsonl medical=b.jsonl`. All its rows stay, in their order; filters are for train alone."""

    test: list[str] = field(default_factory=list, metadata=NAMED_SOURCE)
    """A test set of your own, or several, in the same way. Without --data, they are prepared for evaluation alone."""

    on_both_sides: Literal["drop", "keep", "error"] = "drop"
    """What becomes of a train row that is also in a validation or test set of your own: drop it from train (counted,
    and listed in rejects.jsonl), keep it (and say so), or error. It is the same row where its source is the same, or
    input and output are, in either direction; split_by asks for more."""

    validation_fraction: float | None = None
    """Part of the train rows that is held out to look at during training; 0 for none. Default: 0.05, or none if you
    have a validation or test set of your own."""

    test_fraction: float | None = None
    """Part of the train rows that is held out to the end; the same default."""

    split_by: Literal["both", "source"] | None = None
    """Which texts may not be in train and in another split: both (inputs and outputs) or source (inputs only, for data
    in which many rows share an output, such as classification). Default: both for the parts that are held out by
    fractions, and whole rows, see on_both_sides, for sets of your own."""

    seed: int = 0
    """Decides which rows are held out, which are taken for a mixture, and which of like length are packed together."""

    workers: int = 0
    """Processes that read and encode; 0 picks by the size of the data and the cores."""

    engine: Literal["local", "datatrove"] = "local"
    """What runs the stages of each row: local, or datatrove, whose tasks are kept and not run again when a run broke
    off (extra `datatrove`). On many machines: see `gathered`."""

    tasks: int = 0
    """Parts in which datatrove does it; 0 for four a worker."""

    gathered: str | None = None
    """Folder of the parts that datatrove tasks have written elsewhere, such as on a cluster (how: see
    data_prep/pipeline/datatrove_rows.py); rows are taken from there, and all other settings are those of the tasks."""

    max_row_megabytes: float = 10
    """A longer row is rejected."""

    max_unpacked_ratio: int = 200
    """A compressed file may hold at most so many times its own size (and 64 MB in any case)."""

    strict: bool = False
    """Stop at the first row that cannot be kept, with exit code 2."""


def parse_settings(argv: Sequence[str]) -> PrepareSettings:
    """Raises UserError for what cannot be meant."""
    settings = parse(PrepareSettings, "diptych prepare", argv, USAGE, SECTIONS)
    check_settings(settings)
    return settings


def check_settings(settings: PrepareSettings, has_rows: bool = False) -> None:
    """UserError where settings do not fit each other. `has_rows`: rows are given beside what `data` names."""
    if not (has_rows or settings.data or settings.aligned or settings.validation or settings.test):
        from diptych.data_prep.reading.sources import SAMPLES  # which imports pyarrow

        raise UserError(f"nothing to read: give --data FILE, --data {' or --data '.join(SAMPLES)}, or --aligned A B.")
    if settings.aligned and len(settings.aligned) != 2:
        raise UserError(f"--aligned takes two files, and got {len(settings.aligned)}.")
    if bool(settings.tokenizer) == bool(settings.train_tokenizer):
        raise UserError("give either --tokenizer FOLDER_OR_HUB_ID or --train_tokenizer bpe (or unigram).")
    tokens = settings.vocab_size
    if settings.train_tokenizer and isinstance(tokens, int) and tokens < MINIMUM_VOCAB_SIZE:
        raise UserError(f"vocab_size is {tokens}; bytes and special tokens alone are {MINIMUM_VOCAB_SIZE}.")
    if not settings.out.strip():
        raise UserError("out is empty; it names the folder to write.")
    for name in ("seed", "workers"):
        if getattr(settings, name) < 0:
            raise UserError(f"{name} is {getattr(settings, name)}; it is 0 or more.")
    if settings.end_cut_targets and settings.too_long != "cut":
        raise UserError(
            f"end_cut_targets is for too_long cut, and too_long is {settings.too_long}. Drop one of the two."
        )
    if settings.near_duplicates is not None and not 0 < settings.near_duplicates < 1:
        raise UserError(
            f"near_duplicates is {settings.near_duplicates}; it is a similarity between 0 and 1, such as 0.8."
        )
    for name in ("positive_examples", "negative_examples"):
        if getattr(settings, name) < 0:
            raise UserError(f"{name} is {getattr(settings, name)}; it is a number of examples, 0 for none.")
    _check_engine(settings)
    if settings.max_row_megabytes <= 0 or settings.max_unpacked_ratio < 1:
        raise UserError("max_row_megabytes is above 0 and max_unpacked_ratio at least 1.")
    _check_splits(settings, has_rows)
    for name in ("max_source_tokens", "max_target_tokens"):
        if getattr(settings, name) < 2:
            raise UserError(f"{name} is {getattr(settings, name)}; at least 2: one token of text and eos.")
    _check_packing(settings)


def _check_splits(settings: PrepareSettings, has_rows: bool) -> None:
    for name in ("validation_fraction", "test_fraction"):
        if not 0 <= (getattr(settings, name) or 0) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}; it is a part of all rows, from 0 to below 1.")
    if sum(fraction_of(settings, kind, has_own_sets=False) for kind in HELD_OUT) >= 1:
        raise UserError("validation_fraction and test_fraction together leave no rows to train on. Lower them.")
    if not (has_rows or settings.data or settings.aligned):
        for name in OF_TRAIN_ALONE:
            if getattr(settings, name) != getattr(PrepareSettings(), name):
                raise UserError(f"{name} is for rows to train on, and there is no --data. Drop it, or give --data.")


def fraction_of(settings: PrepareSettings, kind: str, has_own_sets: bool) -> float:
    """Of the train rows, what is held out for validation or for test."""
    given = getattr(settings, f"{kind}_fraction")
    return (0.0 if has_own_sets else USUAL_FRACTION) if given is None else given


def _check_engine(settings: PrepareSettings) -> None:
    if settings.tasks and settings.engine != "datatrove":
        raise UserError(f"tasks are those of datatrove, and engine is {settings.engine}. Add --engine datatrove.")
    if not 0 <= settings.tasks <= MOST_TASKS:
        raise UserError(f"tasks is {settings.tasks}; it is a number up to {MOST_TASKS:,}, 0 for four a worker.")
    if settings.gathered is not None and settings.engine != "local":
        raise UserError("gathered says that the rows are there already, and engine who has to gather them. Drop one.")


def _check_packing(settings: PrepareSettings) -> None:
    unused = PrepareSettings(packing=settings.packing)
    for name in ("packed_source_tokens", "packed_target_tokens", "share_sources", "decoder_start_token_id"):
        if not settings.packing and getattr(settings, name) != getattr(unused, name):
            raise UserError(f"{name} says how to pack, and packing is false. Drop one of the two.")
    for name in ("packed_source_tokens", "packed_target_tokens"):
        tokens = getattr(settings, name)
        if tokens is not None and tokens < 2:
            raise UserError(f"{name} is {tokens}; at least 2: one token of text and eos.")
    start = settings.decoder_start_token_id
    if start is not None and start < 0:
        raise UserError(f"decoder_start_token_id is {start}; token ids begin with 0.")
    is_known = settings.train_tokenizer and isinstance(settings.vocab_size, int)
    if start is not None and is_known and start >= settings.vocab_size:
        raise UserError(
            f"decoder_start_token_id is {start}, and with vocab_size {settings.vocab_size} ids end at"
            f" {settings.vocab_size - 1}. Give one up to there, or none: then it is the padding token."
        )


@dataclass(frozen=True)
class TrainTokenizerSettings:
    """Train a byte-level tokenizer, from which every text comes back exactly."""

    data: list[str] = field(default_factory=list, metadata=SOURCE)
    """What to learn from, one or more: all that `diptych prepare` reads (files, folders, globs, Hub data sets), files
    of plain text (a text a line), folders of prepared data (their train split)."""
    out: str = field(default="tokenizer", metadata=OUTPUT)
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

    tokenizer: str = field(metadata=CHECKPOINT)
    """A tokenizer or checkpoint, as a folder or a Hub id."""
    data: list[str] = field(default_factory=list, metadata=SOURCE)
    """What to measure on, one or more: all that `diptych prepare` reads, files of plain text (a text a line), folders
    of prepared data (their train split)."""
    by: Literal["script", "language", "file"] = "script"
    """What the rows of the table are: the script of most letters, the language as py3langid guesses it (needs the
    extra `clean`), or the file."""
    out: str | None = field(default=None, metadata=OUTPUT)
    """Also write the report as JSON to this file, and its bars as a PNG beside it."""
    text_fields: list[str] = field(default_factory=list)
    """Columns of rows that are text, `answers.text` for one inside another. Default: the texts of the format that is
    recognised, or the column text."""


@dataclass(frozen=True)
class ExtendTokenizerSettings:
    """Add tokens for a new language or domain to a checkpoint's tokenizer, whose old tokens keep their ids."""

    checkpoint: str = field(metadata=CHECKPOINT)
    """The checkpoint whose tokenizer is extended, as a folder or a Hub id."""
    data: list[str] = field(default_factory=list, metadata=SOURCE)
    """Texts of the new language or domain, one or more: all that `diptych prepare` reads, files of plain text (a text
    a line), folders of prepared data (their train split). One text in twenty is held out to measure on."""
    tokens: int = 2000
    """New tokens, at most. Each costs a row of the embedding table, and of the head where that has its own; training
    (with grow_vocabulary) starts it as the mean of the rows that it stands for."""
    out: str = field(default="extended-tokenizer", metadata=OUTPUT)
    """Folder to write: the tokenizer, with what it gains in tokenizer_report.json. Use it as prepare's --tokenizer."""
    minimum_frequency: int = 5
    """A new token stands at least so often in the data: a rarer one would have nothing to learn from."""
    text_fields: list[str] = field(default_factory=list)
    """Columns of rows that are text, `answers.text` for one inside another. Default: the texts of the format that is
    recognised, or the column text."""


TOKENIZER_ACTIONS = {
    "train": (TrainTokenizerSettings, "texts -> a tokenizer that gives every text back"),
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


@dataclass(frozen=True)
class DenoiseSettings:
    """Make pairs of source and target out of raw text, as rows of token ids that `diptych prepare` packs."""

    data: list[str] = field(default_factory=list, metadata=SOURCE)
    """Files of text: .txt with a document a line, rows with a column `text` or of any known format (jsonl, parquet,
    also .gz and .zst), folders, globs, and Hub ids (hf:user/name)."""
    tokenizer: str = field(default="", metadata=CHECKPOINT)
    """Checkpoint whose tokenizer cuts the text: folder or Hub id."""
    out: str = field(default="", metadata=OUTPUT)
    """New folder, for pairs.parquet, and for the tokenizer if sentinels are added to it."""
    objective: Literal["prefix_lm", "span_corruption", "ul2"] = "prefix_lm"
    """prefix_lm asks for no new token, and is what an LLM did all along; the others need sentinels."""
    noise_density: float = 0.15
    """span_corruption: share of the tokens that are cut out."""
    mean_noise_span_length: float = 3.0
    """span_corruption: tokens of a span, on average."""
    minimum_prefix: float = 0.25
    """prefix_lm: the least share of a window that is read; the most is so much from the end. UL2 has its own."""
    max_source_tokens: int = 512
    """The longest source, special tokens included."""
    max_target_tokens: int = 512
    """The longest target."""
    text_fields: list[str] = field(default_factory=list)
    """Columns of rows that are text, where they are not recognised."""
    documents: Literal["line", "file"] = "line"
    """Whether each line of a .txt is a document, or each file (blank lines go)."""
    add_sentinels: int = 0
    """Add so many sentinels <extra_id_0>, <extra_id_1> … to the tokenizer, and save it in OUT/tokenizer."""
    mode_tokens: list[str] = field(default_factory=list)
    """ul2: three tokens of the tokenizer, for R, S and X, with which a source begins."""
    seed: int = 0
    """Of all that is drawn."""

    def __post_init__(self):
        for name, example in {"tokenizer": "a checkpoint", "out": "a new folder"}.items():
            if not getattr(self, name):
                raise UserError(f"{name} is not set. Name {example}: --{name} …")
        if not 0 < self.noise_density < 1 or self.mean_noise_span_length < 1:
            raise UserError("noise_density is a share between 0 and 1, and a span has 1 token or more. Mend them.")
        if not 0 < self.minimum_prefix <= 0.5:
            raise UserError(f"minimum_prefix is {self.minimum_prefix}; it is a share, above 0 and at most 0.5.")
        if self.mode_tokens and (self.objective != "ul2" or len(self.mode_tokens) != 3):
            raise UserError("mode_tokens are three, for R, S and X, of objective ul2. Give them so, or none.")
