"""The settings of `diptych distil`, and the shapes of students."""

from dataclasses import dataclass, field
from typing import Any, Literal

from diptych.data_prep.command_line.arguments import check_numbers
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import CHECKPOINT, EXISTING, NAMES, OUTPUT, SOURCE, START
from diptych.finetune.commands.model_settings import check_positive, split_names

DEEP_AND_SHALLOW = {"encoder": {"num_hidden_layers": 8}, "decoder": {"num_hidden_layers": 2}}
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "diptych-8m",
        {
            **{"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 3, "num_key_value_heads": 1},
            **{"initializer_range": 192**-0.5, "encoder": {"num_hidden_layers": 6}},
            "decoder": {"num_hidden_layers": 2},
        },
    ),
    "small": ("diptych-8m", DEEP_AND_SHALLOW),
    "medium": ("diptych-60m", DEEP_AND_SHALLOW),
}
"""A named size, and what is changed in it: 3.3, 8.3 and 31 million weights without embedding tables. The encoder
reads a source once, the decoder runs once for each token, so its depth decides the speed (arXiv 2006.10369)."""
LOG_PROBABILITY = "log_probability"


@dataclass(frozen=True)
class DistilSettings:
    """A small student out of a large teacher: the teacher writes, the student learns that, and is exported in int8."""

    teacher: str = field(metadata=CHECKPOINT)
    """Checkpoint folder or Hub id of the model that writes. With direction backward: a model of the reverse
    direction."""
    student: str = field(metadata={"check": lambda name, option: name in STUDENTS or START["check"](name, option)})
    """The model that learns: tiny, small or medium (3, 8 and 31 million weights, a deep encoder and two decoder
    layers), another named size (diptych-8m), or a checkpoint. The teacher itself: self-training."""
    data: list[str] = field(default_factory=list, metadata=SOURCE)
    """Rows with targets: parallel text and all else that `diptych prepare` reads, or a folder that it wrote. The test
    split is what the table is about."""
    out: str = field(default="", metadata=OUTPUT)
    """Folder for everything. After an interruption, the same command continues in it."""
    prepare: dict[str, Any] = field(default_factory=dict)
    """Settings of `diptych prepare` for data: {forward: 'Translate English to Korean:', template: translate}."""
    monolingual: str = field(default="", metadata=EXISTING)
    """File of more texts without targets: .txt (a text on each line), or rows as `diptych generate --in_file` takes
    them. Forward, they are sources; backward, they are targets."""
    direction: Literal["forward", "backward"] = "forward"
    """backward is back-translation: the teacher writes the sources of `monolingual`, and the student learns to write
    the real text from them."""
    backward_instruction: str = ""
    """backward: the instruction that the teacher reads, such as 'Translate Korean to English:'. Models with language
    codes need none."""
    most_rows: int | None = None
    """The teacher writes for so many rows of the train split at most, drawn with the seed. Default: all; backward:
    those of `monolingual` alone."""

    samples: int = 4
    """Answers that the teacher writes to each row; the best one is taken."""
    beams: bool = False
    """Not samples, but the most likely answers of a beam search of this width."""
    temperature: float = 0.7
    """Temperature of the samples; with one answer to each row, 0 is greedy."""
    by: str = field(default="chrf", metadata=NAMES)
    """What chooses the best answer: metrics, compared with the target of the row (see `diptych rank`), or
    log_probability. Rows without a target: always the log-probability per token."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each figure, as in `diptych rank`."""
    metric_settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of metrics, as in `diptych evaluate`."""
    worst_score: float | None = None
    """Drop the answer to a row with a target if its score by `by` is worse than this: below a chrf of 40, above a
    token_error_rate of 20."""
    most_nats: float | None = None
    """Drop an answer that is less likely than so many nats per token, such as 1.5."""
    length_factor: float = 3.0
    """Drop an answer if its length, as a multiple of its source's, is more than so many times above or below the
    median of all. 0: no limit."""
    real: bool = True
    """Train on the real rows, too. false: only on what the teacher wrote."""

    vocab_size: int | None = None
    """Train a tokenizer of this size for a new student. Default: the teacher's tokenizer, which word-level
    distillation needs."""
    word_level: float = 0.5
    """Weight of the teacher's predictions in the loss, where both have one vocabulary and one direction. 0: the
    student learns from texts alone, which is faster."""
    train: dict[str, Any] = field(default_factory=dict)
    """Settings of the student's recipe (`diptych train`): {epochs: 5, learning_rate: 5.0e-4, batch_size: 8}."""
    baseline: bool = False
    """Also train the same student for as many steps on the real rows alone, without the teacher, for the table."""

    metrics: str = field(default="chrf", metadata=NAMES)
    """Metrics of the table."""
    limit: int | None = None
    """Rows of the test split that are evaluated, drawn from all. Default: all."""
    precision: str = "int8"
    """Precision of the CTranslate2 folder, as in `diptych export`."""
    batch_size: int = 32
    """Prompts per batch when the teacher writes, and in evaluation."""
    max_new_tokens: int | None = None
    """Longest answer of the teacher in tokens. Default: a quarter more than the longest target."""
    hours_only: bool = False
    """Print how long it will take, and end."""
    device: str = "auto"
    """cpu, cuda, cuda:1; `auto` uses an accelerator if there is one."""
    seed: int = 0
    """Seed of samples, of drawn rows, and of training."""

    def __post_init__(self):
        if not self.data or not self.out:
            name, what = ("data", "rows with targets") if not self.data else ("out", "a folder")
            raise UserError(f"{name} is not set. Name {what}: --{name} …")
        check_positive(self, "samples", "batch_size", "max_new_tokens", "limit", "vocab_size", "most_rows")
        check_numbers(self, RANGES)
        if self.samples > 1 and not self.beams and not self.temperature:
            raise UserError("temperature is 0, at which all samples are the same. Give one above 0, or --samples 1.")
        if self.direction == "backward" and not self.monolingual:
            raise UserError("direction is backward, and there are no texts to write sources for. Give --monolingual.")
        if self.vocab_size and self.student not in STUDENTS and not self.student.startswith("diptych-"):
            raise UserError(f"vocab_size is for a new student, and {self.student} has its own tokenizer. Drop it.")
        if not split_names(self.metrics):
            raise UserError("metrics names none, and the table is of one. Give --metrics chrf.")
        for name, taken in TAKEN.items():
            if given := sorted(getattr(self, name).keys() & taken):
                raise UserError(f"{name} has {given[0]}, which distil sets itself. Take it out of {name}.")
        if given := [name for name in ("terms", "placeholders") if self.prepare.get(name)]:
            raise UserError(
                f"prepare has {given[0]}, but the teacher is asked plain texts. Leave it out; afterwards, prepare"
                f" written.jsonl with --{given[0]}, and train a student on that."
            )

    def settings_of(self, metrics: str) -> dict[str, Any]:
        """Those of `metric_settings` that are for one of these metrics."""
        return {name: value for name, value in self.metric_settings.items() if name in metrics}

    @property
    def is_self_training(self) -> bool:
        return self.student == self.teacher


RANGES = {
    "0 to 1": (lambda value: 0 <= value <= 1, "word_level"),
    "0, or 1 or more": (lambda value: value == 0 or value >= 1, "length_factor"),
}
TAKEN = {
    "prepare": {"data", "out"},
    "train": {"model", "data", "out", "resume", "tokenizer", "stages", "teacher", "distill_weight", "seed"},
}
