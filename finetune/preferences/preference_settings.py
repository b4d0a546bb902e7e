"""What `diptych sample` and `diptych rank` can be told."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diptych.data_prep.command_line.arguments import parse
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import EXISTING, NAMES, OUTPUT
from diptych.finetune.commands.model_settings import PromptSettings, split_names
from diptych.finetune.inference.generate_settings import GenerateSettings


@dataclass(frozen=True)
class SampleSettings(PromptSettings):
    """Several answers to each prompt of a file, with their log-probabilities: what `diptych rank` reads."""

    data: str = field(default="", metadata=EXISTING)
    """File of prompts, as `diptych generate --in_file` reads it: .jsonl, .csv, .tsv or .txt. Other fields, such as the
    reference in `output`, are kept."""
    out: str = field(default="", metadata=OUTPUT)
    """JSONL file to write: one line for each line of data. After an interruption, the same command continues it."""
    overwrite: bool = False
    """Write out again from its first row, and do not continue it."""
    samples: int = 8
    """Answers to each prompt."""
    temperature: float = 1.0
    """Temperature at which tokens are sampled."""
    top_k: int = 0
    """Sample among so many of the most likely tokens only; 0: among all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that have this probability together; 1: among all."""
    beams: bool = False
    """Not samples, but the most likely answers that a beam search of this width finds. They differ less."""
    diversity: float = 0.0
    """Above 0: diverse beams, one for each answer. A token costs so many nats for each earlier answer that has it at
    the same place."""
    instruction: str = ""
    """The instruction of each line of a .txt file, whose lines are then inputs."""
    system: str = ""
    """A system prompt for each line of a .txt file."""
    batch_size: int = 16
    """Prompts per batch; each stands there as often as it has answers."""
    max_source_tokens: int | None = None
    """Longer prompts are cut to this many tokens, with a notice. Default: the model's own limit."""
    max_new_tokens: int | None = None
    """Maximum length of answers in tokens. Default: 256, or the model's own limit if that is lower."""
    seed: int = 0
    """Seed of the sampling."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Any other argument of transformers' generate: `--generation.epsilon_cutoff 0.02`."""

    def __post_init__(self):
        for name, what in (("data", "a file of prompts"), ("out", "the file to write")):
            if not getattr(self, name):
                raise UserError(f"{name} is not set. Name {what}: --{name} FILE")
        if self.samples < 2:
            raise UserError(f"samples is {self.samples}; it takes 2 or more to rank them.")
        if not self.beams and self.temperature <= 0:
            raise UserError(
                f"temperature is {self.temperature:g}, at which all samples are the same. Give one above 0, or --beams"
                f" true for the likeliest answers."
            )
        drawn = [
            name for name in ("temperature", "top_k", "top_p") if getattr(self, name) != getattr(SampleSettings, name)
        ]
        if (self.beams or self.diversity) and drawn:
            raise UserError(f"beams are not sampled, and {drawn[0]} is for samples. Drop one of them.")

    def of_generation(self) -> GenerateSettings:
        """The same in the words of `diptych generate`, which does it."""
        shared = ("model", "dtype", "device", "template", "source_language", "target_language", "overwrite", "seed")
        shared += ("instruction", "system", "batch_size", "max_source_tokens", "max_new_tokens")
        is_drawn = not (self.beams or self.diversity)
        return GenerateSettings(
            **{name: getattr(self, name) for name in shared},
            in_file=self.data,
            out_file=self.out,
            num_return_sequences=self.samples,
            num_beams=self.samples if self.beams else 1,
            temperature=self.temperature if is_drawn else 0.0,
            diversity=self.diversity,
            scores=True,
            generation=({"top_k": self.top_k, "top_p": self.top_p} if is_drawn else {}) | self.generation,
        )


def parse_sample(argv: Sequence[str]) -> GenerateSettings:
    return parse(SampleSettings, "diptych sample", argv).of_generation()


@dataclass(frozen=True)
class RankSettings:
    """Answers that `diptych sample` wrote -> pairs of a better and a worse one, by metrics."""

    samples: str = field(metadata=EXISTING)
    """The JSONL file of `diptych sample`; or of `diptych generate` with several outputs for each prompt."""
    out: str = field(default="", metadata=OUTPUT)
    """JSONL file to write: the row's own fields, with `chosen`, `rejected` and the scores of both. A report is beside
    it, in *.report.json."""
    overwrite: bool = False
    """Replace out, if it is there."""
    by: str = field(default="chrf", metadata=NAMES)
    """Metrics, separated by commas, as in `diptych evaluate --metrics`: built in, evaluate:NAME, my_module:function.
    Each answer is scored alone; bleu is the sentence-level form of sacrebleu (effective order)."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each figure in the sum that decides: '{chrf: 1, rougeL: 0.5}'. Default: 1 for each; a metric with
    several figures needs it. Figures of which lower is better count as negative."""
    metric_settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of metrics, as in `diptych evaluate`."""
    reference: str = ""
    """Field of the rows that has the reference, a text or a list of texts. Default: the first of references,
    reference, output, response, completion, target and summary. `none`: there is none, which metrics of your own may
    do without."""
    pairs: Literal["best_worst", "best_random", "all"] = "best_worst"
    """The best answer with the worst; with a random worse one; or all pairs of a better and a worse one."""
    margin: float = 0.0
    """Pairs whose scores differ by less are dropped; so are ties, also with 0."""
    unfinished: bool = False
    """Take answers, too, that the token limit ended. Default: they are dropped."""
    seed: int = 0
    """Seed of best_random."""

    def __post_init__(self):
        if not self.out:
            raise UserError("out is not set. Name the file to write: --out FILE")
        if not split_names(self.by):
            raise UserError("by names no metric. Name one: --by chrf")
        if self.margin < 0:
            raise UserError(f"margin is {self.margin:g}; it must be 0 or more.")
