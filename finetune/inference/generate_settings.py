"""The settings of `diptych generate`."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import CHECKPOINT, EXISTING, OUTPUT
from diptych.data_prep.rows.json_schema import read_schema
from diptych.finetune.commands.model_settings import PromptSettings, check_positive

LINES_SUFFIX = ".txt"
"""Files of prompts with a text on each line; all others are JSONL or tables."""

NOT_EMPTY = {"not_empty": True}
"""Metadata of a setting that cannot be given as an empty text (arguments.py)."""


@dataclass(frozen=True)
class GenerateSettings(PromptSettings):
    """Text from a trained encoder-decoder: one prompt, an interactive session (no prompt or file given), or a file."""

    model: str = field(metadata=CHECKPOINT)
    """Checkpoint folder (after training: RUN/final), adapter folder, or Hub id; with --engine ctranslate2 the folder
    that `diptych export` wrote."""
    engine: Literal["torch", "ctranslate2"] = "torch"
    """Library that computes: torch, or CTranslate2, which is faster on CPUs."""
    instruction: str = ""
    """The instruction of a single prompt, or of each line of a .txt file."""
    input: str = ""
    """The text to which the instruction applies; alone, for models that need no instruction, such as NLLB."""
    system: str = ""
    """A system prompt, for templates that use one; in a session or for a .txt file, it applies to all prompts."""
    in_file: str = field(default="", metadata=EXISTING)
    """JSONL file of rows with `instruction`, `input` or both, and optionally `history`, `system`, `source_language`,
    `target_language`; or with `messages`. Other fields are kept. Or a .csv or .tsv file with such columns. Or a .txt
    file, in which each line is an input for --instruction or for the languages, or an instruction if none is given."""
    out_file: str = field(default="", metadata=OUTPUT)
    """JSONL file to write: one line for each line of in_file, in order, also for a blank one. After an interruption,
    the same command continues it."""
    overwrite: bool = False
    """Write out_file again from its first row, and do not continue it."""
    batch_size: int = 16
    """Prompts per batch. More is faster until memory is full."""
    max_source_tokens: int | None = None
    """Longer prompts are cut to this many tokens, with a notice, or as --long says. Default: the model's own limit."""
    long: Literal["cut", "split", "reduce"] = "cut"
    """What to do with long sources. `split`: translations are generated sentence by sentence, and other texts over
    the limit in pieces; the outputs are joined as the source was. `reduce`: for summaries, pieces are summarised, and
    then their summaries together, until these fit. Both need the language of the source."""
    terms: str = field(default="", metadata=EXISTING)
    """Terms to use: a file with a term, a tab and its translation on each line. They are written into the source as
    `diptych prepare --terms` wrote them for training, and terms that an output misses are reported."""
    placeholders: bool = False
    """Replace URLs, tags and numbers by placeholders, which become them again in the output. Values that do not come
    back exactly once are reported."""
    max_new_tokens: int | None = None
    """Maximum length of outputs in tokens; with --long, of the output of each piece. Default: 256, or the model's own
    limit if that is lower."""
    num_beams: int = 1
    """Width of beam search; 1 is greedy."""
    temperature: float = 0.0
    """Above 0, tokens are sampled at this temperature; at 0, the most likely token is taken."""
    num_return_sequences: int = 1
    """Outputs for each prompt; with beams, the most likely first, by mean log-probability per token. Needs as many
    beams, or sampling."""
    diversity: float = 0.0
    """Above 0: outputs by diverse beam search. A token costs so many nats for each earlier output of the prompt that
    has it at the same place."""
    scores: bool = False
    """Print the log-probability of each output, in nats, in total and as the mean per token."""
    confidence: bool = False
    """How far each output can be trusted: log-probabilities, what of the source it did not look at, repetition,
    language, and its probability of being right, if `diptych evaluate --calibrate true` stored how to compute it."""
    abstain_below: float | None = None
    """Mark outputs whose probability of being right is lower as left to a person. Implies confidence."""
    choices: list[str] = field(default_factory=list)
    """Answer with the one of these texts that is most likely for the model."""
    json_schema: str = field(default="", metadata=EXISTING | NOT_EMPTY)
    """File with a JSON schema that every output has to fit. Needs the extra `structured`."""
    regex: str = field(default="", metadata=NOT_EMPTY)
    """Regular expression that every output has to match as a whole. Needs the extra `structured`."""
    mbr_samples: int = 0
    """Draw so many samples for each prompt, and take the one that is most similar to the others by chrF (minimum Bayes
    risk); 0: off."""
    seed: int = 0
    """Seed of the sampling."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Any other argument of transformers' generate: `--generation.top_p 0.9 --generation.length_penalty 0.6`."""

    def __post_init__(self):
        check_positive(self, "batch_size", "max_source_tokens", "max_new_tokens", "num_beams", "num_return_sequences")
        if bool(self.in_file) != bool(self.out_file):
            given, missing = ("in_file", "out_file") if self.in_file else ("out_file", "in_file")
            raise UserError(
                f"--{given} was given without --{missing}. Give both, or neither for a prompt or a session."
            )
        asks_of_each_line = self.in_file.endswith(LINES_SUFFIX)
        if self.in_file and (self.input or ((self.instruction or self.system) and not asks_of_each_line)):
            raise UserError(
                "--in_file and a prompt were both given. Drop --instruction, --input and --system, or the files; "
                "--instruction and --system can be given for a .txt file, whose lines are texts."
            )
        is_other = self.temperature or self.num_beams > 1 or self.mbr_samples
        if self.diversity < 0 or self.diversity and (is_other or self.num_return_sequences < 2):
            raise UserError(
                f"diversity is {self.diversity:g}; it is above 0, for num_return_sequences of 2 or more, and is no"
                " sampling and no other beam search: drop temperature, num_beams and mbr_samples."
            )
        is_greedy = self.temperature == 0 and not (self.choices or self.diversity)
        if self.num_return_sequences > 1 and is_greedy and self.num_beams < self.num_return_sequences:
            raise UserError(
                f"num_return_sequences is {self.num_return_sequences}, but num_beams={self.num_beams} has no more "
                f"without sampling. Give --num_beams {self.num_return_sequences}, or --temperature 1."
            )
        if self.num_beams > 1 and self.generation.get("prompt_lookup_num_tokens"):
            raise UserError("generation.prompt_lookup_num_tokens is for greedy writing. Drop it, or num_beams.")
        if self.mbr_samples and (
            self.mbr_samples < 2 or max(self.num_beams, self.num_return_sequences) > 1 or self.temperature
        ):
            raise UserError(
                f"mbr_samples is {self.mbr_samples}. It takes 2 or more to choose one output, and they are drawn in a "
                f"way of their own: drop num_beams, num_return_sequences and temperature."
            )
        drawn = self.mbr_samples or self.temperature or self.diversity or self.num_beams > 1 or self.generation
        if self.choices and drawn:
            raise UserError("choices are weighed: drop mbr_samples, temperature, diversity, num_beams and generation.")
        if self.choices and (self.long != "cut" or self.terms or self.placeholders):
            raise UserError("choices are given texts: drop them, or --long, --terms and --placeholders.")
        check_torch(self, "scores", "confidence", "abstain_below", "diversity")
        if self.abstain_below is not None and not 0 <= self.abstain_below <= 1:
            raise UserError(f"abstain_below is {self.abstain_below}; it must be a probability: from 0 to 1.")
        if self.trusts and self.choices:
            raise UserError("choices are compared by --scores: drop confidence and abstain_below.")
        check_form(self)
        if self.choices and not len(set(self.choices)) == len(self.choices) >= self.num_return_sequences:
            raise UserError("choices must be different texts, and at least num_return_sequences.")

    @property
    def trusts(self) -> bool:
        """Whether the confidence of outputs is asked for."""
        return self.confidence or self.abstain_below is not None

    def generation_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of `scoring.chosen_outputs`."""
        form = asked_form(self)
        if self.choices:
            return {"choices": self.choices, "num_return_sequences": self.num_return_sequences, "scores": self.scores}
        if self.trusts:
            plain = replace(self, scores=False, confidence=False, abstain_below=None)
            return {"scores": True, "unread": True} | plain.generation_kwargs()
        if self.scores:
            return {"scores": True} | replace(self, scores=False).generation_kwargs()
        if self.mbr_samples:
            return {"mbr_samples": self.mbr_samples} | self.generation | form
        if self.diversity:
            plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "diversity": self.diversity}
            return plain | {"num_return_sequences": self.num_return_sequences} | self.generation | form
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        beams = {"num_beams": self.num_beams, "num_return_sequences": self.num_return_sequences}
        return sampling | beams | self.generation | form


def check_form(settings: Any) -> None:
    """UserError where `json_schema` and `regex` are given together, or beside what they do not go with."""
    asked = [name for name in ("choices", "json_schema", "regex") if getattr(settings, name, None)]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} exclude each other: an output has one form. Drop all but one.")
    if asked and getattr(settings, "long", "cut") != "cut":
        raise UserError(f"{asked[0]} is for a whole answer, and --long {settings.long} joins several. Drop one.")
    check_torch(settings, *asked)


def check_torch(settings: Any, *names: str) -> None:
    """UserError where one of these settings is given, and another engine, which does not have it."""
    asked = [name for name in names if getattr(settings, name) not in (None, False, "")]
    if asked and getattr(settings, "engine", "torch") != "torch":
        raise UserError(
            f"--{asked[0]} works with --engine torch alone: give the checkpoint that the export was made of, or leave"
            f" --{asked[0]} out."
        )


def asked_form(settings: Any) -> dict[str, Any]:
    """`{"grammar": Grammar(…)}` where the settings have a `json_schema` file or a `regex`."""
    if not (settings.json_schema or settings.regex):
        return {}
    from diptych.finetune.inference.constraints import grammar_of  # which imports torch

    schema = read_schema(settings.json_schema) if settings.json_schema else None
    return {"grammar": grammar_of(schema, settings.regex or None)}
