"""The settings of the commands of this folder but `train` (config.py); their docstrings are the text of --help.

Nothing heavy is imported here, so that --help and mistakes are answered at once; what only a model, a tokenizer or
another library knows is checked by the work.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from diptych.data_prep.command_line.arguments import parse
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.places import CHECKPOINT, EXISTING, OUTPUT, PREPARED, TEMPLATE
from diptych.data_prep.rows.records import Languages
from diptych.finetune.commands.web_address import check_port

LINES_SUFFIX = ".txt"
"""Of files of prompts in which each line is a text; all others are JSONL."""
WORDS = ("man", "woman", "king", "queen", "prince", "princess", "boy", "girl", "father", "mother")
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]")
PRECISIONS = {
    "ctranslate2": ("float32", "bfloat16", "float16", "int8", "int8_float32", "int8_bfloat16", "int8_float16"),
    "onnx": ("float32",),
}
"""What the engines store weights in."""


@dataclass(frozen=True)
class GenerateSettings:
    """Text from a trained encoder-decoder: one prompt, a session (neither prompt nor file given), or a file."""

    model: str = field(metadata=CHECKPOINT)
    """Checkpoint folder (after training: RUN/final), adapter folder, or Hub id; with --engine ctranslate2 the folder
    that `diptych export` wrote."""
    engine: Literal["torch", "ctranslate2"] = "torch"
    """What computes: torch, or CTranslate2, which is faster on CPUs."""
    instruction: str = ""
    """The instruction of a single prompt, or of each line of a .txt file."""
    input: str = ""
    """The input that the instruction is about; without one, for models that need none, such as NLLB."""
    source_language: str = ""
    """Language of the input, for models that are told: a code of the tokenizer (eng_Latn), or a short one (en). Rows
    may bring their own. For T5, input without instruction begins `translate English to Korean:`."""
    target_language: str = ""
    """Language of the output, likewise. What is not given is as the tokenizer says."""
    system: str = ""
    """A system prompt, for templates that have a place for one; in a session or a .txt file, for every prompt."""
    in_file: str = field(default="", metadata=EXISTING)
    """JSONL file of rows with `instruction`, `input` or both and, where there are any, `history`, `system`,
    `source_language`, `target_language`, or with `messages`; other fields are kept. Or a .csv or .tsv file with such
    columns, or a .txt file, of which each line is the input of --instruction or of the languages, or an instruction
    where none is given."""
    out_file: str = field(default="", metadata=OUTPUT)
    """JSONL file to write: one line for each of in_file, in order, also for a blank one. Started again after a kill,
    it goes on where it was."""
    overwrite: bool = False
    """Start out_file again from its first row, whatever is in it."""
    template: str = field(default="", metadata=TEMPLATE)
    """Name or file of a prompt template; the one saved with the tokenizer unless given."""
    batch_size: int = 16
    """Prompts generated together. More is faster until memory is full."""
    max_source_tokens: int | None = None
    """Longer prompts are cut to this many tokens, which is said; the model's own limit unless given."""
    max_new_tokens: int | None = None
    """No output gets longer than this many tokens; 256, or the model's own limit if that is lower, unless given."""
    num_beams: int = 1
    """Width of beam search; 1 is greedy."""
    temperature: float = 0.0
    """Above 0, tokens are sampled at this temperature; 0 takes the likeliest."""
    num_return_sequences: int = 1
    """Outputs for each prompt, of beams the likeliest first, by the log-probability of the mean token; needs as many
    beams, or sampling."""
    scores: bool = False
    """Say of each output how likely it was: its log-probability, in nats, and that of its mean token."""
    choices: list[str] = field(default_factory=list)
    """Answer with one of these texts, the one that the model finds likeliest, and nothing else."""
    mbr_samples: int = 0
    """Draw so many samples for each prompt and take the one that is most like the others by chrF (minimum Bayes risk);
    0 does not."""
    seed: int = 0
    """Seed of the sampling."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Any other argument of transformers' generate: `--generation.top_p 0.9 --generation.length_penalty 0.6`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto` is as the checkpoint was saved."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; `auto` takes an accelerator if there is one."""

    def __post_init__(self):
        for name in ("batch_size", "max_source_tokens", "max_new_tokens", "num_beams", "num_return_sequences"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
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
        is_greedy = self.temperature == 0 and not self.choices
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
        if self.choices and (self.mbr_samples or self.temperature or self.num_beams > 1 or self.generation):
            raise UserError("choices are weighed: drop mbr_samples, temperature, num_beams and generation.")
        if self.engine != "torch" and (self.choices or self.scores):
            raise UserError("scores and choices are of torch: drop them, or --engine ctranslate2.")
        if self.choices and not len(set(self.choices)) == len(self.choices) >= self.num_return_sequences:
            raise UserError("choices are texts that differ, no fewer than num_return_sequences. Mend them.")
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (no sampling) or more.")

    @property
    def languages(self) -> Languages:
        return Languages(self.source_language, self.target_language)

    def generation_kwargs(self) -> dict[str, Any]:
        """Those of `reranking.chosen_outputs`."""
        if self.choices:
            return {"choices": self.choices, "num_return_sequences": self.num_return_sequences, "scores": self.scores}
        if self.scores:
            return {"scores": True} | replace(self, scores=False).generation_kwargs()
        if self.mbr_samples:
            return {"mbr_samples": self.mbr_samples} | self.generation
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        beams = {"num_beams": self.num_beams, "num_return_sequences": self.num_return_sequences}
        return sampling | beams | self.generation


@dataclass(frozen=True)
class EvaluateSettings:
    """Loss and metrics of a checkpoint on one split of a prepared dataset, or on all its test sets."""

    model: str = field(metadata=CHECKPOINT)
    """Checkpoint folder (after training: RUN/final), adapter folder, or Hub id."""
    data: str = field(default="", metadata=PREPARED)
    """Prepared dataset, the folder that `diptych prepare` wrote."""
    split: str = "test"
    """The split to evaluate: test, validation, train; test/news for one of several test sets with names, of which test
    means all, one after the other."""
    metrics: str = "exact_match,token_f1,rouge,bleu,chrf"
    """Names, separated by commas; an empty string gives the loss alone, which is much faster."""
    out: str = field(default="", metadata=OUTPUT)
    """JSON file for the report; the predictions go beside it, into *.predictions.jsonl. Printed only unless given. Of
    several sets each has its own: report.news.json, report.medical.json."""
    source_language: str = ""
    """Only rows whose source is in this language: a code of the tokenizer (eng_Latn), or a short one (en)."""
    target_language: str = ""
    """Only rows whose target is in this language."""
    limit: int | None = None
    """Only so many rows, drawn from the whole split, the same ones each time."""
    batch_size: int = 16
    """Rows together. More is faster until memory is full."""
    max_new_tokens: int | None = None
    """No output gets longer than this; a quarter more than the longest target unless given."""
    num_beams: int = 1
    """Width of beam search; 1 is greedy."""
    mbr_samples: int = 0
    """Draw so many samples of each output and take the one that is most like the others by chrF (minimum Bayes risk);
    0 does not. 16 take about as long as 16 beams."""
    seed: int = 0
    """Seed of these samples, and of the intervals' resampling."""
    generation: dict[str, Any] = field(default_factory=dict)
    """Any other argument of transformers' generate: `--generation.length_penalty 2`."""
    bleu_tokenize: str = ""
    """sacrebleu's name of a tokenisation (13a, intl, char, ko-mecab …); chosen by the targets' script unless given."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto` is as the checkpoint was saved."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; `auto` takes an accelerator if there is one."""

    def __post_init__(self):
        if not self.data:
            raise UserError("data is not set. Name the folder that `diptych prepare` wrote: --data FOLDER.")
        for name in ("limit", "batch_size", "max_new_tokens", "num_beams"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.mbr_samples and (self.mbr_samples < 2 or self.num_beams > 1):
            raise UserError(
                f"mbr_samples is {self.mbr_samples} with num_beams={self.num_beams}. It takes 2 samples or more to "
                f"choose one, and samples need no beams: --mbr_samples 16 --num_beams 1."
            )

    def metric_names(self) -> list[str]:
        return [name.strip() for name in self.metrics.split(",") if name.strip()]


@dataclass(frozen=True)
class CompareSettings:
    """Two runs or two evaluation reports: what differs, losses, metrics with intervals, paired tests, and curves."""

    run_a: str = field(metadata=EXISTING)
    """Run folder (what `out` of the recipe named), or a report that `diptych evaluate --out` wrote."""
    run_b: str = field(metadata=EXISTING)
    """The other one. Reports that lie in a run folder are found; of each split the newest is taken."""
    out: str = field(default="", metadata=OUTPUT)
    """JSON file for all figures; the picture of the curves goes beside it. Printed only unless given."""
    trials: int = 10_000
    """Random exchanges of outputs for each p-value, whose smallest possible value is 1 / (trials + 1)."""
    seed: int = 0
    """Seed of the tests."""

    def __post_init__(self):
        if self.trials < 1:
            raise UserError(f"trials is {self.trials}; it must be 1 or more.")


@dataclass(frozen=True)
class InspectSettings:
    """What an encoder-decoder makes of one input, step by step, on a page to look at."""

    model: str = field(metadata=CHECKPOINT)
    """Checkpoint folder (after training: RUN/final), adapter folder, or Hub id."""
    instruction: str = field(default="", metadata={"instead_of": ("source",)})
    """The instruction, as `diptych generate` takes it: the template turns it into the source."""
    input: str = ""
    """The input that the instruction is about; without one, for models that need none, such as NLLB."""
    source_language: str = ""
    """Language of the source, for models that are told: a code of the tokenizer (eng_Latn), or a short one (en)."""
    target_language: str = ""
    """Language of the output, likewise. What is not given is as the tokenizer says."""
    system: str = ""
    """A system prompt, for templates that have a place for one."""
    source: str = field(default="", metadata={"instead_of": ("instruction", "input", "system", "template")})
    """The source as the encoder is to read it, without any template, in place of an instruction."""
    target: str = ""
    """What the output should have been. The page then shows what each of its tokens costs, and where the model would
    go another way."""
    data: str = field(default="", metadata=EXISTING)
    """JSONL file of rows with `instruction` (and `input`, `output` …): over all of them, which words of sources no
    output looked at, and which tokens of outputs looked at nothing."""
    rows: int = 100
    """Of data, so many rows from the first on."""
    out: str = field(default="inspect.html", metadata=OUTPUT)
    """The page to write; an older one is replaced."""
    words: list[str] = field(default_factory=lambda: list(WORDS))
    """Words whose vectors are shown on a plane."""
    template: str = field(default="", metadata=TEMPLATE)
    """Name or file of a prompt template; the one saved with the tokenizer unless given."""
    max_new_tokens: int = 64
    """No output gets longer than this many tokens."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto` is as the checkpoint was saved."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; `auto` takes an accelerator if there is one."""

    def __post_init__(self):
        if self.instruction and self.source or not (self.instruction or self.input or self.source):
            given = "both were" if self.source else "neither was"
            raise UserError(
                f"--instruction (with --input), or --source is what the model is to read, but {given} given. Give one."
            )
        if self.source and (self.input or self.system or self.template):
            raise UserError("--source is read as it is: drop --input, --system and --template, or give --instruction.")
        for name in ("rows", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more.")


@dataclass(frozen=True)
class DemoSettings:
    """A page on which to try a checkpoint, or two of them side by side."""

    model: str = field(metadata=CHECKPOINT)
    """Checkpoint folder (after training: RUN/final), adapter folder, or Hub id."""
    beside: str = field(default="", metadata=CHECKPOINT)
    """A second checkpoint, whose answer is shown beside."""
    host: str = "127.0.0.1"
    """Address to listen at. Any but the loopback's needs a password in the environment, DIPTYCH_PASSWORD; the user is
    diptych."""
    port: int = 7860
    """0 takes a free one, which is said."""
    examples: str = field(default="", metadata=EXISTING)
    """JSONL file of rows with `instruction` and `input`, of which the first are offered on the page."""
    template: str = field(default="", metadata=TEMPLATE)
    """Name or file of a prompt template; the one saved with the tokenizer unless given."""
    source_language: str = ""
    """Language of the input at first, for models that are told: a code of the tokenizer, or a short one (en)."""
    target_language: str = ""
    """Language of the answer at first, likewise."""
    max_new_tokens: int | None = None
    """The longest answer that can be asked for; 256, or the model's own limit if that is lower, unless given."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto` is as the checkpoint was saved."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; `auto` takes an accelerator if there is one."""

    def __post_init__(self):
        check_port(self.port)
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more.")


@dataclass(frozen=True)
class ServeSettings:
    """A checkpoint behind OpenAI's HTTP interface: completions and chat, streamed or whole."""

    model: str = field(metadata=CHECKPOINT)
    """Checkpoint folder (after training: RUN/final), adapter folder, or Hub id."""
    host: str = "127.0.0.1"
    """Address to listen at. Any but the loopback's needs a token in the environment, DIPTYCH_TOKEN."""
    port: int = 8000
    """0 takes a free one, which is said."""
    name: str = ""
    """What clients call the model; the folder's name unless given."""
    template: str = field(default="", metadata=TEMPLATE)
    """Name or file of a prompt template; the one saved with the tokenizer unless given."""
    source_language: str = ""
    """Language of prompts that bring none, for models that are told: a code of the tokenizer, or a short one (en).
    Requests may bring `source_language` and `target_language`."""
    target_language: str = ""
    """Language of answers, likewise. What is not given is as the tokenizer says."""
    batch_size: int = 16
    """Prompts that are generated together, at most."""
    batch_wait_ms: float = 5.0
    """Milliseconds that the first prompt of a batch waits for others."""
    queue: int = 256
    """Prompts that may wait; more are told to come again (503). A request with more is refused (400)."""
    timeout: float = 120.0
    """Seconds after which a request is given up (504), its waiting included."""
    max_source_tokens: int | None = None
    """Longer prompts are refused; the model's own limit unless given."""
    max_new_tokens: int | None = None
    """No output gets longer than this many tokens; 256, or the model's own limit if that is lower, unless given."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto` is as the checkpoint was saved."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; `auto` takes an accelerator if there is one."""

    def __post_init__(self):
        for name in ("batch_size", "queue", "max_source_tokens", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        check_port(self.port)
        if self.timeout <= 0 or self.batch_wait_ms < 0:
            raise UserError("timeout is above 0 seconds, and batch_wait_ms 0 or more. Mend them.")

    @property
    def model_name(self) -> str:
        return self.name or Path(self.model.rstrip("/")).name


@dataclass(frozen=True)
class DoctorSettings:
    """Whether a checkpoint's training is right, and what to do where it is not."""

    model: str = field(metadata=CHECKPOINT)
    """Checkpoint folder (after training: RUN/final), adapter folder, or Hub id."""
    data: str = field(default="", metadata=EXISTING)
    """Rows to examine it with: a prepared folder, or a .json or .jsonl file; built-in sentences unless given."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps; `auto` takes an accelerator if there is one."""
    json: bool = False
    """Print JSON instead of the table."""


@dataclass(frozen=True)
class PublishSettings:
    """Publish the final model of a run on the Hub: in one commit, with a model card, read back."""

    run: str = field(metadata=EXISTING)
    """Run folder, as `diptych train` wrote it."""
    to: str = ""
    """Repository on the Hub, as owner/name. It is made if there is none."""
    public: bool = False
    """Let everybody see it; it is private unless given."""
    base: str = ""
    """For an adapter that was trained on a folder: the Hub id under which that base is published. Its weights there
    are compared with those in the folder."""
    license: str = ""
    """Licence for the card, as the Hub spells it (apache-2.0, cc-by-4.0 …); the card names none unless given."""
    language: str = ""
    """Languages for the card, separated by commas (en,ko); those that `diptych prepare` filtered by unless given."""
    pipeline: bool = False
    """Let code travel with it by which transformers' pipeline("text2text-generation") works, with
    trust_remote_code=True, where Diptych is not installed."""
    dry_run: bool = False
    """Print the files with their sizes, and the card; connect to nothing."""

    def __post_init__(self):
        if not self.to:
            raise UserError("to is not set. Name the repository on the Hub: --to owner/name")
        if not REPO.fullmatch(self.to):
            raise UserError(f"to is {self.to!r}; it has to be owner/name, as on the Hub: --to owner/name")


@dataclass(frozen=True)
class PairSettings:
    """Make an encoder-decoder of a decoder-only LLM (Llama, Mistral, Qwen2, Qwen3, SmolLM3 and their kin), or of two
    with one tokenizer."""

    encoder: str = field(metadata=CHECKPOINT)
    """Folder or Hub id of the LLM that the encoder is made of, and the decoder, too, unless there is a second one."""
    out: str = field(default="", metadata=OUTPUT)
    """New folder for the encoder-decoder."""
    decoder: str | None = field(default=None, metadata=CHECKPOINT)
    """The LLM that the decoder is made of; it may also be given as a second name."""
    cross_attention: Literal["merged", "separate"] = "merged"
    """How the decoder reads. merged: in the softmax of its self-attention, source and target as one text: nothing that
    the LLM knows is lost, no weight is new. separate: by a sub-layer of its own, for panels of any depth and width; it
    has to be trained before the model is worth anything."""
    encoder_attention: Literal["bidirectional", "causal"] = "bidirectional"
    """What an encoder's token sees. causal is the LLM as it was, to the digit; bidirectional sees the whole source,
    which costs little at once and pays after some training."""
    cross_attention_init: Literal["copied", "fresh", "zeroed"] = "copied"
    """What separate cross-attention begins with: the decoder's self-attention (where shapes agree), random weights, or
    the former with a zero output, so that the decoder at first writes as if there were no source."""
    decoder_layers: int | None = None
    """Keep so many of the decoder's layers, evenly spaced. Faster; the report says how much worse it is at first."""
    encoder_layer_map: list[int] | None = None
    """For the merged hinge and LLMs of unequal depth: after how many encoder layers each decoder layer reads."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the weights are saved in; auto: as the decoder's donor."""
    text: str | None = field(default=None, metadata=EXISTING)
    """A UTF-8 file for the proof: its first tokens are halved into source and target. By default a few sentences."""
    proof: bool = True
    """Load donor and result in fp32, one after the other, and compare what they compute. It takes 4 bytes a weight of
    memory; without it, nothing but a shard of weights is ever loaded."""
    seed: int = 0
    """Of fresh weights."""

    def __post_init__(self):
        if not self.out:
            raise UserError("out is not set. Name a new folder for the encoder-decoder: --out …")
        if self.cross_attention == "merged" and self.cross_attention_init != "copied":
            raise UserError(
                "the merged hinge has no cross-attention to begin with anything. Drop cross_attention_init, or take"
                " --cross_attention separate."
            )
        if self.cross_attention == "separate" and self.encoder_layer_map:
            raise UserError(
                "encoder_layer_map belongs to the merged hinge. Drop it, or take --cross_attention merged."
            )


def parse_pair(argv: Sequence[str]) -> PairSettings:
    """The second LLM may be given as a second name, without --decoder."""
    argv = list(argv)
    if len(argv) > 1 and not any(word.startswith("-") for word in argv[:2]):
        argv = [argv[0], "--decoder", *argv[1:]]
    return parse(
        PairSettings, "diptych pair", argv, "diptych pair ENCODER [DECODER] --out FOLDER [--SETTING VALUE ...]"
    )


@dataclass(frozen=True)
class MergeSettings:
    """Merge an adapter into its base: a plain checkpoint, that from_pretrained loads."""

    adapter: str = field(metadata=CHECKPOINT)
    """Adapter folder (after training: RUN/final) or Hub id."""
    out: str = field(default="", metadata=OUTPUT)
    """New folder for the checkpoint."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the weights are saved in. float32 is what was trained; the others take half the room, and round."""

    def __post_init__(self):
        if not self.out:
            raise UserError("out is not set. Name a new folder for the checkpoint: --out …")


@dataclass(frozen=True)
class ExportSettings:
    """Export a checkpoint to another engine, and prove that it writes the same."""

    model: str = field(metadata=CHECKPOINT)
    """Checkpoint folder (after training: RUN/final), adapter folder, or Hub id. An adapter is merged."""
    to: Literal["ctranslate2", "onnx"] = "ctranslate2"
    """The engine."""
    out: str = field(default="", metadata=OUTPUT)
    """New folder for the export."""
    precision: str = "float32"
    """What weights are stored in. ctranslate2: float32, bfloat16, float16, int8 (with int8_float32, int8_bfloat16,
    int8_float16: what is not quantized). onnx: float32."""
    rows: str = field(default="", metadata=EXISTING)
    """JSONL file of prompts to compare on, as `generate` takes them; `output` or `outputs` are references. The
    examples that travel with the template and built-in sentences unless given."""
    template: str = field(default="", metadata=TEMPLATE)
    """Name or file of a prompt template; the one saved with the tokenizer unless given. It is saved in the export."""
    max_new_tokens: int = 64
    """No row gets longer in the comparison."""
    batch_size: int = 8
    """Rows written together in the comparison."""
    device: str = "cpu"
    """Where both are run for the comparison: cpu, or cuda."""

    def __post_init__(self):
        if not self.out:
            raise UserError("out is not set. Name a new folder for the export: --out …")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.precision not in PRECISIONS[self.to]:
            raise UserError(
                f"precision is {self.precision!r}; for {self.to} there is {', '.join(PRECISIONS[self.to])}."
            )
