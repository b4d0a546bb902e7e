"""The settings of `diptych evaluate` and `diptych compare`."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import EXISTING, NAMES, OUTPUT, PREPARED
from diptych.finetune.commands.model_settings import ModelSettings, check_positive, split_names
from diptych.finetune.inference.generate_settings import NOT_EMPTY, check_form, check_torch


@dataclass(frozen=True)
class EvaluateSettings(ModelSettings):
    """Loss and metrics of a checkpoint on one split of a prepared dataset, or on all its test sets."""

    data: str = field(default="", metadata=PREPARED)
    """Prepared dataset, the folder that `diptych prepare` wrote."""
    engine: Literal["torch", "ctranslate2"] = "torch"
    """Library that computes: torch, or CTranslate2; then MODEL is the folder that `diptych export` wrote."""
    split: str = "test"
    """The split to evaluate: test, validation, train; or test/news for one of several test sets with names. test means
    all test sets, one after the other."""
    metrics: str = field(default="exact_match,token_f1,rouge,bleu,chrf", metadata=NAMES)
    """Names, separated by commas; an empty string computes only the loss, which is much faster. Built in: exact_match,
    token_f1, token_error_rate, rouge, bleu, chrf, superni_rougeL, json. A function of yours: my_module:function; add
    :min if lower is better. Of the library evaluate: evaluate:NAME, or the path of a script. Also comet, bertscore."""
    metric_settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of metrics: '{bertscore: {model: PATH, layers: 17}, my_function: {threshold: 3}}'."""
    by: str = field(default="", metadata=NAMES)
    """Columns of the prepared rows, separated by commas: all figures are also given for each value of the column, such
    as task (see `diptych prepare --keep_columns`), target_language or direction."""
    out: str = field(default="", metadata=OUTPUT)
    """JSON file for the report; the predictions are in *.predictions.jsonl in the same folder. Default: print only.
    With several sets, each has its own file: report.news.json, report.medical.json."""
    source_language: str = ""
    """Only rows whose source is in this language: a code of the tokenizer (eng_Latn), or a short one (en)."""
    target_language: str = ""
    """Only rows whose target is in this language."""
    limit: int | None = None
    """Evaluate only so many rows, a random sample of the split, the same one each time."""
    batch_size: int = 16
    """Rows per batch. More is faster until memory is full."""
    long: Literal["cut", "split"] = "cut"
    """split: translations are generated sentence by sentence, and other sources over the limit in pieces, as by
    `diptych generate`; the loss is of the prepared rows."""
    max_source_tokens: int | None = None
    """The longest source that is generated in one piece. Default: the model's own limit."""
    terms: str = field(default="", metadata=EXISTING)
    """Terms that are written into the sources that are generated, as by `diptych generate`; terms_honoured is the
    percentage that outputs have."""
    max_new_tokens: int | None = None
    """Maximum length of outputs. Default: a quarter more than the longest target."""
    num_beams: int = 1
    """Width of beam search; 1 is greedy."""
    mbr_samples: int = 0
    """Draw so many samples for each output, and take the one that is most similar to the others by chrF (minimum Bayes
    risk); 0: off. 16 samples take about as long as 16 beams."""
    seed: int = 0
    """Seed of these samples, and of the bootstrap for the intervals."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Any other argument of transformers' generate: `--generation.length_penalty 2`."""
    confidence: str = ""
    """How well the model's confidence tells right outputs from wrong ones. A metric by which they are right:
    exact_match, or chrf:60 for a chrF of at least 60. With --out, a plot of risk over coverage is written, too."""
    calibrate: bool = False
    """Store with the model how the probability of being right follows from log-probabilities, for `diptych generate
    --confidence`. Use a split that is neither trained on nor reported: --split validation."""
    json_schema: str = field(default="", metadata=EXISTING | NOT_EMPTY)
    """File with a JSON schema: outputs are generated to fit it, and the metric `json` counts those that do. Needs the
    extra `structured`."""
    regex: str = field(default="", metadata=NOT_EMPTY)
    """Regular expression that every output has to match as a whole. Needs the extra `structured`."""
    bleu_tokenize: str = ""
    """Tokenisation of sacrebleu (13a, intl, char, ko-mecab …). Default: chosen by the script of the targets."""

    @property
    def all_metrics(self) -> list[str]:
        return list(dict.fromkeys(split_names(self.metrics) + (["json"] if self.json_schema else [])))

    @property
    def all_metric_settings(self) -> dict[str, Any]:
        given = {"bleu": {"tokenize": self.bleu_tokenize}} if self.bleu_tokenize else {}
        given |= {"json": {"schema": self.json_schema}} if self.json_schema else {}
        return self.metric_settings | given

    def __post_init__(self):
        if not self.data:
            raise UserError("data is not set. Name the folder that `diptych prepare` wrote: --data FOLDER.")
        check_form(self)
        check_torch(self, "confidence")
        if self.calibrate and not (self.confidence and os.path.isdir(os.path.expanduser(self.model))):
            raise UserError(
                "calibrate stores a fit in the model's folder, by what `confidence` names: give a folder as model, and"
                " --confidence exact_match or another metric."
            )
        check_positive(self, "limit", "batch_size", "max_source_tokens", "max_new_tokens", "num_beams")
        if self.mbr_samples and (self.mbr_samples < 2 or self.num_beams > 1):
            raise UserError(
                f"mbr_samples is {self.mbr_samples} with num_beams={self.num_beams}. It takes 2 samples or more to "
                f"choose one, and samples need no beams: --mbr_samples 16 --num_beams 1."
            )


@dataclass(frozen=True)
class CompareSettings:
    """Two runs or two evaluation reports: what differs, losses, metrics with intervals, and paired tests."""

    run_a: str = field(metadata=EXISTING)
    """Run folder (`out` of the recipe), or a report that `diptych evaluate --out` wrote."""
    run_b: str = field(metadata=EXISTING)
    """The other one. Reports in a run folder are found; of each split, the newest is used."""
    out: str = field(default="", metadata=OUTPUT)
    """JSON file for all figures. Printed only unless given."""
    trials: int = 10_000
    """Random permutations for each p-value. The smallest possible p-value is 1 / (trials + 1)."""
    metrics: str = field(default="", metadata=NAMES)
    """Metrics of the reports that are not built in and are to be tested, too, separated by commas. They run code, so
    they are not taken from the reports."""
    metric_settings: dict[str, Any] = field(default_factory=dict)
    """Their further arguments, which have to be those of the reports."""
    seed: int = 0
    """Seed of the tests."""

    def __post_init__(self):
        if self.trials < 1:
            raise UserError(f"trials is {self.trials}; it must be 1 or more.")
