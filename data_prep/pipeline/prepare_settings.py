"""The settings of `diptych prepare`: the docstrings of their fields are the text of --help.

diptych prepare --config prepare.yaml --data a.json b.json --strict
→ PrepareSettings(data=["a.json", "b.json"], strict=True, …)     the command line goes before the file

Nothing heavy is imported here, so that --help and mistakes are answered at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from diptych.data_prep.cleaning.filters import LengthFilter
from diptych.data_prep.cleaning.mixture import Mixture
from diptych.data_prep.command_line.arguments import check_numbers, parse
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import (
    CHECKPOINT,
    EXISTING,
    NAMED,
    NAMED_SOURCE,
    OUTPUT,
    SOURCE,
    TEMPLATE,
)
from diptych.data_prep.rows.convert_rows import SUMMARY_INSTRUCTION
from diptych.data_prep.rows.named_splits import HELD_OUT
from diptych.data_prep.text_to_ids.train_tokenizer import MINIMUM_VOCAB_SIZE

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
"""The headings of --help, by the first setting below each."""

USUAL_FRACTION = 0.05
OF_PACKING_ALONE = ("packed_source_tokens", "packed_target_tokens", "share_sources", "decoder_start_token_id")
OF_TRAIN_ALONE = (
    *("mixture", "train_tokenizer", "near_duplicates", "decontaminate", "lengths", "source_languages"),
    *("target_languages", "json_schema", *OF_PACKING_ALONE[:3], "on_both_sides"),
    *("validation_fraction", "test_fraction", "split_by"),
)
"""Settings that have no effect without rows to train on."""

RANGES = {
    "2 or more (a token of text and eos)": (
        lambda value: value >= 2,
        "max_source_tokens max_target_tokens packed_source_tokens packed_target_tokens",
    ),
    "a similarity between 0 and 1, such as 0.8": (lambda value: 0 < value < 1, "near_duplicates"),
    "a part of all rows, from 0 to below 1": (lambda value: 0 <= value < 1, "validation_fraction test_fraction"),
    "a number up to 99,999, 0 for four a worker": (lambda value: 0 <= value <= 99_999, "tasks"),
    "above 0": (lambda value: value > 0, "max_row_megabytes"),
    "1 or more": (lambda value: value >= 1, "shingle_size decontaminate_ngram max_unpacked_ratio vocab_size"),
    "0 to 1": (lambda value: 0 <= value <= 1, "language_confidence inline_share"),
}
"""Which values numbers may have; of all others, 0 or more."""


@dataclass(frozen=True)
class PrepareSettings:
    """From files of instruction rows or parallel text to a checked, tokenised and packed dataset."""

    data: list[str] = field(default_factory=list, metadata=SOURCE)
    """What to read, one or more: files (.json, .jsonl, .csv, .tsv, .tmx, .parquet, .arrow; text also as .gz or .zst),
    folders, globs, included samples (tatoeba, cmudict, seed_tasks), Hub data sets (hf:user/name, hf:user/name:split),
    two aligned files (a.en+a.ko). In a folder, a saved DatasetDict or a Hub data set, names such as train, valid, dev
    or test determine the split of each part."""

    aligned: list[str] = field(default_factory=list, metadata=SOURCE)
    """Two text files of parallel text: line N of the first is the translation of line N of the second."""

    format: str | None = None
    """Format of the rows: alpaca, dolly, prompt_completion, messages, sharegpt, natural_instructions, self_instruct,
    parallel, summarisation, tokenised; of answers that were judged: preference, marked, rated, edits. Default:
    recognised from the first rows of each source, and printed."""

    map: list[str] = field(default_factory=list, metadata=NAMED)
    """Names of your columns, after the names that the format has: `--map output=answer instruction=q.text`. If all are
    numbers, csv and tsv files have no header: `--map instruction=1 output=2`."""

    keep_columns: list[str] = field(default_factory=list, metadata=NAMED)
    """More columns of your rows to store as text in the prepared dataset, such as `task`: `diptych evaluate --by task`
    groups figures by it. `domain=meta.source` stores your column `meta.source` under the name `domain`."""

    forward: str | None = None
    """Instruction for parallel text from the first side to the second, such as 'Translate English to Korean:'; '' for
    models with language codes, which need none. Without it, there are no rows in this direction. Included samples have
    instructions for both directions, which are used if you give neither."""

    backward: str | None = None
    """Instruction for parallel text from the second side to the first."""

    languages: list[str] = field(default_factory=list)
    """Which two languages of multilingual parallel text are the first and the second side: `--languages en ko`. If a
    row has no `en`, `EN` or all of its regions are used: `en-GB`, `en_US`."""

    summary_instruction: str = SUMMARY_INSTRUCTION
    """The instruction of summarisation pairs."""

    positive_examples: int = 0
    """Number of worked examples of a Natural Instructions task that are added to its instruction."""

    negative_examples: int = 0
    """Number of wrong answers that are added to it."""

    rated_pairs: Literal["best_worst", "all"] = "best_worst"
    """Which of several rated answers to a prompt become pairs of a better and a worse one: the best and the worst, or
    all. Ties never do."""

    rated_margin: float = 0
    """By how much the ratings of a pair differ at least."""

    mixture: Mixture | None = None
    """How several sources are mixed in the train split. Default: each row once."""

    out: str = field(default="prepared", metadata=OUTPUT)
    """Folder to write. It is replaced if it contains only an older prepared dataset."""

    template: str | None = field(default=None, metadata=TEMPLATE)
    """How a row becomes source text and target text: alpaca, plain, chat, translate, or a Jinja file. Default: the
    template in the tokenizer, else chat for conversations and alpaca for all other formats."""

    tokenizer: str | None = field(default=None, metadata=CHECKPOINT | {"instead_of": ("train_tokenizer",)})
    """The tokenizer of the checkpoint that you will fine-tune, as a folder or a Hub id."""

    train_tokenizer: Literal["bpe", "unigram"] | None = field(default=None, metadata={"instead_of": ("tokenizer",)})
    """Train a new tokenizer on the train split instead: bpe or unigram."""

    vocab_size: int | Literal["auto"] = 8000
    """Vocabulary size of a trained tokenizer. A larger one makes texts shorter and the model larger. auto: doubles the
    size as long as this makes texts at least a tenth shorter."""

    source_language: str | None = None
    """Language of the sources (parallel text: of the first side): a code of the tokenizer (NLLB: eng_Latn, mBART:
    en_XX, M2M100: en), or a short code that is not ambiguous (en). Rows can have their own: source_language, src_lang.
    For a tokenizer without codes, rows without an instruction begin `translate English to Korean:`."""

    target_language: str | None = None
    """Language of the targets (parallel text: of the second side). Rows can have their own: target_language,
    tgt_lang."""

    terms: str | None = field(default=None, metadata=EXISTING)
    """Terms that a model learns to use: a file with a term, a tab and its translation on each line. In a share of the
    rows that have both, the translation is written behind the term in the source: `a cat [= 고양이]`."""

    placeholders: bool = False
    """In a share of the rows, put placeholders (`[#1]`) on both sides for URLs, tags and numbers that both have, so
    that a model learns to return them."""

    inline_share: float = 0.5
    """The share of rows with terms or placeholders in which they are written."""

    max_source_tokens: int = 512
    """Longest source, including the tokenizer's end token."""

    max_target_tokens: int = 512
    """Longest target, including its eos token."""

    too_long: Literal["drop", "cut", "error"] = "drop"
    """What to do with a longer row: drop it (counted, and listed in rejects.jsonl), cut it, or error. A target is cut
    at its end, a source at the ends of its longest fields; the template's text is kept. An answer that was judged is
    never cut: its row is dropped."""

    end_cut_targets: bool = False
    """Whether a cut target still ends in eos. A model that is trained on such targets stops in mid-sentence."""

    lossy_text: Literal["keep", "drop", "error"] = "keep"
    """What to do with a row if the tokenizer loses text, such as line breaks in code (T5), capital letters (BERT) or
    characters that are not in its vocabulary: keep it (counted, with an example), drop it, or error."""

    deduplicate: bool = True
    """Remove rows with the same source and target as an earlier row."""

    near_duplicates: float | None = None
    """Also remove rows that share at least this part of their shingles with an earlier row (Jaccard similarity, by
    MinHash), such as 0.8."""

    shingle_size: int = 5
    """Length of the shingles of near_duplicates, in characters. 3 is good for short sentences."""

    decontaminate: list[str] = field(default_factory=list, metadata=SOURCE)
    """Files with texts that must not be in train, such as evaluation sets, in a format that --data takes, or .txt with
    one text per line. Train rows that share a sequence of words with them are removed."""

    decontaminate_ngram: int = 13
    """Length of this sequence in words. Shorter texts count as a whole: from 8 words, or if the rows are equal."""

    lengths: LengthFilter | None = None
    """Bounds on the length of source and target, and on their ratio, in characters or words."""

    source_languages: list[str] = field(default_factory=list)
    """Keep rows whose source is in one of these languages (codes such as en, ko). Needs the extra `clean`."""

    target_languages: list[str] = field(default_factory=list)
    """Keep rows whose target is in one of these languages."""

    json_schema: str = field(default="", metadata=EXISTING)
    """File with a JSON schema: keep rows whose target is JSON that fits it. Needs the extra `structured`."""

    language_confidence: float = 0.7
    """Minimum confidence that a text is in another language. Short texts seldom reach it, and are kept."""

    sensitive: bool = False
    """Search for e-mail addresses, phone and card numbers, keys and passwords, and report them, masked. Nothing is
    changed or removed. Needs the extra `clean`."""

    packing: bool = True
    """Also write the train split as packed rows, each with several examples, which need no padding. false writes only
    separate examples. So does true with the tokenizer of a family that is not packed (docs/families.md)."""

    packed_source_tokens: int | None = None
    """Source tokens of a packed row, at least those of the longest source. Default: chosen together with
    packed_target_tokens, so that rows are short and full."""

    packed_target_tokens: int | None = None
    """Target tokens of a packed row, at least those of the longest target. Default: chosen in the same way."""

    share_sources: bool = False
    """Encode the same source in a packed row once for all its targets: for data with several targets per source.
    Always so if answers were judged."""

    decoder_start_token_id: int | None = None
    """The first decoder input of each packed example. Default: the id in the checkpoint's config, else the padding
    token, as in T5 and Diptych."""

    validation: list[str] = field(default_factory=list, metadata=NAMED_SOURCE)
    """Your own validation set, which is evaluated during training: takes what --data takes. Several sets have names:
    `--validation news=a.jsonl medical=b.jsonl`. All its rows are kept in their order; filters apply to train only."""

    test: list[str] = field(default_factory=list, metadata=NAMED_SOURCE)
    """Your own test set, or several, in the same way. Without --data, they are prepared for evaluation only."""

    on_both_sides: Literal["drop", "keep", "error"] = "drop"
    """What to do with a train row that is also in your validation or test set: drop it from train (counted, and listed
    in rejects.jsonl), keep it (with a warning), or error. Rows are the same if their sources are, or if input and
    output are, also exchanged; split_by can remove more."""

    validation_fraction: float | None = None
    """Part of the train rows that is held out for evaluation during training; 0 for none. Default: 0.05, or none if
    you give a validation or test set."""

    test_fraction: float | None = None
    """Part of the train rows that is held out for the final evaluation; the same default."""

    split_by: Literal["both", "source"] | None = None
    """Which texts must not be both in train and in another split: both (inputs and outputs) or source (inputs only,
    for data in which many rows share an output, such as classification). Default: both for fractions; for your own
    sets, whole rows only (see on_both_sides)."""

    seed: int = 0
    """Seed for the choice of held-out rows, of rows in a mixture, and for packing among rows of similar length."""

    workers: int = 0
    """Processes that read and encode; 0 chooses by the size of the data and the number of cores."""

    engine: Literal["local", "datatrove"] = "local"
    """Which program processes the rows: local, or datatrove. datatrove keeps finished tasks, and does not repeat them
    after an interruption (extra `datatrove`). For several machines, see `gathered`."""

    tasks: int = 0
    """Number of tasks for datatrove; 0 is four per worker."""

    gathered: str | None = None
    """Folder with the output of datatrove tasks that ran elsewhere, such as on a cluster (how: see
    data_prep/pipeline/datatrove_rows.py). Rows are read from it; all other settings must be those of the tasks."""

    max_row_megabytes: float = 10
    """Longer rows are rejected."""

    max_unpacked_ratio: int = 200
    """Largest size of an uncompressed file, as a multiple of the compressed size (64 MB are always allowed)."""

    strict: bool = False
    """Stop at the first row that cannot be kept, with exit code 2."""

    def __post_init__(self) -> None:
        check_numbers(self, RANGES)

    @property
    def kept(self) -> dict[str, str]:
        """`keep_columns`: its name in the prepared dataset → the column of the rows."""
        entries = [entry.partition("=") for entry in self.keep_columns]
        return {name: column or name for name, _, column in entries}


def parse_settings(argv: Sequence[str]) -> PrepareSettings:
    """Raises UserError for settings that are wrong, or do not fit each other."""
    settings = parse(PrepareSettings, "diptych prepare", argv, USAGE, SECTIONS)
    check_settings(settings)
    return settings


def fraction_of(settings: PrepareSettings, kind: str, has_own_sets: bool) -> float:
    """The part of the train rows that is held out for validation or test (`kind`)."""
    given = getattr(settings, f"{kind}_fraction")
    return (0.0 if has_own_sets else USUAL_FRACTION) if given is None else given


def check_settings(settings: PrepareSettings, has_rows: bool = False) -> None:
    """Raises UserError where a value is not allowed, or settings do not fit each other. `has_rows`: rows are given in
    memory, so `data` may be empty."""
    has_train_rows = has_rows or bool(settings.data or settings.aligned)
    if not (has_train_rows or settings.validation or settings.test):
        from diptych.data_prep.reading.sources import SAMPLES  # which imports pyarrow

        raise UserError(f"nothing to read: give --data FILE, --data {' or --data '.join(SAMPLES)}, or --aligned A B.")
    if settings.aligned and len(settings.aligned) != 2:
        raise UserError(f"--aligned takes two files, and got {len(settings.aligned)}.")
    if bool(settings.tokenizer) == bool(settings.train_tokenizer):
        raise UserError("give either --tokenizer FOLDER_OR_HUB_ID or --train_tokenizer bpe (or unigram).")
    if not settings.out.strip():
        raise UserError("out is empty; it names the folder to write.")
    if sum(fraction_of(settings, kind, has_own_sets=False) for kind in HELD_OUT) >= 1:
        raise UserError("validation_fraction and test_fraction together leave no rows to train on. Lower them.")
    _check_together(settings, has_train_rows)


def _check_together(settings: PrepareSettings, has_train_rows: bool) -> None:
    tokens, start = settings.vocab_size, settings.decoder_start_token_id
    is_size_known = settings.train_tokenizer and isinstance(tokens, int)
    if is_size_known and tokens < MINIMUM_VOCAB_SIZE:
        raise UserError(f"vocab_size is {tokens}; bytes and special tokens alone are {MINIMUM_VOCAB_SIZE}.")
    if is_size_known and start is not None and start >= tokens:
        raise UserError(
            f"decoder_start_token_id is {start}, and with vocab_size {tokens} ids end at {tokens - 1}. Give one up to"
            " there, or none: then it is the padding token."
        )
    if settings.end_cut_targets and settings.too_long != "cut":
        raise UserError(
            f"end_cut_targets is for too_long cut, and too_long is {settings.too_long}. Drop one of the two."
        )
    if settings.tasks and settings.engine != "datatrove":
        raise UserError(f"tasks are those of datatrove, and engine is {settings.engine}. Add --engine datatrove.")
    if settings.gathered is not None and settings.engine != "local":
        raise UserError("gathered says that the rows are there already, and engine who has to gather them. Drop one.")
    usual = PrepareSettings()
    given = [field.name for field in fields(settings) if getattr(settings, field.name) != getattr(usual, field.name)]
    for name in given:
        if not has_train_rows and name in OF_TRAIN_ALONE:
            raise UserError(f"{name} is for rows to train on, and there is no --data. Drop it, or give --data.")
        if not settings.packing and name in OF_PACKING_ALONE:
            raise UserError(f"{name} says how to pack, and packing is false. Drop one of the two.")
