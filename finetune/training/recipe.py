"""The recipe of a training run: every setting, its unit and its consequence. Field docstrings are the text of --help.

    accelerate launch -m diptych.finetune.train --config recipe.yaml --learning_rate 1e-4

A recipe is YAML; settings on the command line go before it. The run folder has the result as config.yaml. recipes/ has
some to start from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diptych.data_prep.command_line.arguments import given_options, instead_of, parse
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import CHECKPOINT, OUTPUT, PREPARED, START


@dataclass(frozen=True)
class TrainRecipe:
    """Fine-tune an encoder-decoder, or train a Diptych from scratch, on a prepared dataset."""

    model: str = field(default="", metadata=START)
    """Where training starts: a checkpoint folder or Hub id of any AutoModelForSeq2SeqLM, or a named size
    (diptych-8m, -60m, -220m, -770m, -3b), which starts from random weights."""
    model_overrides: dict[str, Any] = field(default_factory=dict)
    """Config values of a named size, such as {residual_dropout: 0.1}. A checkpoint takes none: it has its config."""
    data: str = field(default="", metadata=PREPARED)
    """Folder that `diptych prepare` wrote: its split `train` is trained on, its validation sets are evaluated."""
    out: str = field(default="", metadata=OUTPUT)
    """Run folder, made if need be. It must be empty unless `resume` is set."""
    tokenizer: str | None = field(default=None, metadata=CHECKPOINT)
    """Tokenizer saved with the model; the prepared folder's unless given. Its vocabulary must be the same."""
    grow_vocabulary: bool = False
    """Allow a tokenizer with more tokens than the model has embedding rows: rows are added, which LoRA trains too."""
    resume: bool | str = False
    """`true` goes on from the newest sound checkpoint in `out`, or begins if there is none yet. The folder of an
    earlier checkpoint goes back to that one, and moves the later ones to checkpoints/aside."""
    seed: int = 0
    """Seed of new weights, the order of rows, and dropout."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Trainings one after the other: [{name: heal, max_steps: 500, data: …}, {name: instruct, epochs: 2}]. Each is the
    recipe with these settings over it, in `out`/stages/, and starts from the model that the one before it made."""

    epochs: int | None = field(default=None, metadata={"instead_of": ("max_steps",)})
    """Passes over the training rows. Give this or max_steps; on the command line either replaces a recipe's other."""
    max_steps: int | None = field(default=None, metadata={"instead_of": ("epochs",)})
    """Optimizer steps. Give this or epochs."""
    packed: bool = True
    """Train on packed rows, which hold several examples each: the same loss and gradients, at a multiple of the speed.
    If the model's family or the prepared folder has none, training takes padded rows, and says so."""
    batch_size: int = 4
    """Rows computed together on one rank (a packed row holds several examples). More is faster until memory is full.
    An optimizer step has batch_size × gradient_accumulation_steps × ranks rows."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are added up before an optimizer step: a larger batch in the memory of a small one."""
    group_by_length: bool = True
    """Padded rows: put those of like length into the same batch, for less padding, in a slightly less random order.
    Packed rows are all of one length."""

    learning_rate: float = 3e-4
    """Peak learning rate. From scratch 1e-3 to 3e-4; a checkpoint in full 1e-4 to 3e-5; LoRA 1e-3 to 1e-4."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """What the learning rate does after warm-up: fall to zero as a half cosine or a line, or stay."""
    warmup_steps: int = field(default=0, metadata={"instead_of": ("warmup_ratio",)})
    """Steps in which the learning rate rises from zero. Give this or warmup_ratio."""
    warmup_ratio: float = field(default=0.0, metadata={"instead_of": ("warmup_steps",)})
    """The same as a share of all steps, 0 to 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW: how slowly the means of the gradient and of its square change. From scratch, 0.95 to 0.98 as the second
    is steadier."""
    epsilon: float = 1e-8
    """AdamW: added to the root of the second mean."""
    weight_decay: float = 0.01
    """AdamW: share of each weight that is taken off per step, times the learning rate; never of norms and biases."""
    max_grad_norm: float = 1.0
    """A longer gradient is shortened to this length; 0 leaves it."""
    label_smoothing: float = 0.0
    """Share of the target's probability that training spreads over all words; validation loss stays unsmoothed."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's denominator (PaLM: 1e-4), which keeps logits from drifting."""

    trainable: Literal["all", "cross_attention"] = "all"
    """cross_attention: only cross-attention is trained, all other weights are frozen: the first stage for a pair with
    the separate hinge. `patience` ends it when the validation loss no longer falls."""
    open_encoder_steps: int = 0
    """Let a Diptych's encoder begin causal, like the LLM that it was made of, and open it gradually over so many
    steps: at step s of n, a token sees s/n of the longest row ahead."""
    teacher: str | None = field(default=None, metadata=CHECKPOINT)
    """Folder or Hub id of a model with the same tokenizer, whose predictions are learned beside the targets
    (distillation, arXiv 1503.02531): an encoder-decoder, or decoder-only, such as the LLM that a pair was made of."""
    distill_weight: float = 0.5
    """With a teacher: the share of its predictions in the loss, 0 to 1. The targets have the rest."""
    distill_temperature: float = 1.0
    """With a teacher: both predictions are flattened by it, so that unlikely words count for more."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the forward pass; weights and optimizer are always fp32. `auto` measures (50 ms) and takes the
    faster of bf16 and fp32; a resumed run keeps it. fp16, with a scaled loss, is for GPUs without bf16; T5, mT5, UMT5
    and T5Gemma overflow in it and are refused."""
    attention: Literal["auto", "eager", "sdpa", "flex_attention", "varlen"] = "auto"
    """How attention is computed. `varlen` computes nothing between examples of a packed row: flash attention on a GPU,
    segment by segment on a CPU. `auto` takes it if family and device can, else what the model prefers."""
    sharding: Literal["none", "full"] = "none"
    """What each of several ranks holds. none: the whole model, which is fastest if it fits. full: its share of
    weights, gradients and optimizer (FSDP2): 16 bytes a weight, divided by the ranks."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: about a third slower, with a fraction of the memory."""
    compile: bool = False
    """torch.compile each layer: up to minutes at the start, then faster steps on a GPU, but not on a CPU. Packed rows
    compile once; padded rows are compiled again for new shapes."""

    method: Literal["full", "lora"] = "full"
    """Train all weights, or LoRA adapters (arXiv 2106.09685) on a frozen checkpoint."""
    lora_variant: Literal["lora", "rslora", "dora"] = "lora"
    """rslora: a scale that suits high ranks. dora: direction and length of each weight apart; slower, often better at
    low ranks."""
    lora_rank: int = 16
    """Rank of each adapter; its size in memory and on disk is proportional."""
    lora_alpha: float = 32.0
    """Scale: the adapter's output is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Probability of dropping an input of an adapter."""
    lora_targets: str = ""
    """Names of the layers that get an adapter, separated by commas; all linear layers of the family unless given."""
    peft_config: dict[str, Any] = field(default_factory=dict)
    """Another of peft's methods, with its fields: {peft_type: IA3, feedforward_modules: [wo]}; or HRA, LOHA, LOKR,
    MISS, OFT, VERA. Of LoRA's own: rank_pattern, alpha_pattern, exclude_modules."""
    quantize: Literal["none", "4bit"] = "none"
    """4bit: QLoRA (arXiv 2305.14314), the frozen base in 4 bits (nf4) on a CUDA GPU, by bitsandbytes: a fifth of the
    memory. The adapter is later loaded onto, and merged into, the base in its own precision."""
    lora_embeddings: bool = False
    """Train the embedding tables and the head beside the adapters, in full: for a language the model hardly knows.
    Such an adapter, like one with new tokens, cannot be loaded beside others: `diptych merge` it first."""

    eval_every: int | None = None
    """Steps between evaluations on the validation sets; once an epoch unless given. There is one at the end, too."""
    eval_batch_size: int = 16
    """Examples computed together in evaluation, on one rank, padded."""
    metrics: str = ""
    """Metrics of generated text at each evaluation, separated by commas: exact_match, token_f1, rouge, bleu, chrf,
    superni_rougeL, token_error_rate (of words or phonemes between spaces). The outputs are kept in samples.jsonl."""
    metrics_limit: int = 100
    """Rows of each validation set that are generated for the metrics, the same ones each time."""
    max_new_tokens: int | None = None
    """No generated output gets longer than this; a quarter more than the longest target unless given."""
    best_metric: str = "loss"
    """What decides which checkpoint is best: loss, or with `metrics` any of their figures (exact_match, rougeL, chrf
    …), exact_match_rows, or unfinished. Of several validation sets it is the mean, each counting the same, or that of
    one: medical/chrf, news/loss."""
    patience: int = 0
    """Evaluations without a better best_metric after which training stops early; 0 never."""

    save_every: int | None = None
    """Steps between checkpoints; once an epoch unless given. A new best and the end are always saved."""
    keep_last: int = 2
    """Checkpoints to keep, the newest ones; the best is kept besides."""
    final: Literal["best", "last"] = "best"
    """Which checkpoint becomes `final/`. Without a validation split it is the last."""
    logging_every: int = 10
    """Steps between log lines."""
    rank_timeout: float = 1800.0
    """Seconds that a rank waits for the others before the run ends with exit code 6. It must be longer than writing a
    checkpoint takes, which one rank does while the others wait."""
    debug: bool = False
    """Show the traceback under an error message."""
    profile: bool = False
    """Record three steps with torch.profiler: profile/trace.json (a chrome trace) and profile/table.txt."""
    trackers: str = ""
    """Experiment trackers, separated by commas: those that accelerate knows and that are installed (tensorboard …)."""

    def __post_init__(self):
        for name in ("model", "data", "out", "tokenizer", "teacher"):
            if (getattr(self, name) or "").startswith("~"):
                object.__setattr__(self, name, str(Path(getattr(self, name)).expanduser()))
        for name, example in {
            "model": "a named size (diptych-8m) or a checkpoint",
            "data": "the folder that `diptych prepare` wrote",
            "out": "a new folder for the run",
        }.items():
            if not getattr(self, name):
                raise UserError(f"{name} is not set. Name {example}: --{name} …")
        if not self.stages and (self.epochs is None) == (self.max_steps is None):
            given = "neither was" if self.epochs is None else "both were"
            raise UserError(f"training lasts for epochs or for max_steps, but {given} given. Give one of them.")
        for allowed, (is_allowed, names) in RANGES.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not is_allowed(value):
                    raise UserError(f"{name} is {value}; it must be {allowed}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas are {list(self.betas)}; both must be 0 or more and below 1.")
        if self.warmup_steps and self.warmup_ratio:
            raise UserError("warmup_steps and warmup_ratio are both given. Keep one of them.")
        self._check_adapter()
        if self.teacher and self.label_smoothing:
            raise UserError(
                "label_smoothing is given beside a teacher, whose predictions smooth the targets already. Drop one."
            )
        if self.trainable != "all" and self.method != "full":
            raise UserError(f"trainable is {self.trainable}, but method is {self.method}. Set method: full.")
        if self.metrics:
            # imported here, since the libraries of metrics take seconds
            from diptych.finetune.evaluating.metrics import check_metric_names

            check_metric_names(split_names(self.metrics))
        if self.best_metric.rpartition("/")[2] != "loss" and not self.metrics:
            raise UserError(
                f"best_metric is {self.best_metric}, but no metrics are computed. "
                f"Name them in `metrics`, or choose by loss."
            )

    def _check_adapter(self) -> None:
        """UserError for a setting of an adapter that would have no effect, or that contradicts another."""

        def changed(*names: str) -> list[str]:
            return [name for name in names if getattr(self, name) != getattr(TrainRecipe, name, {})]

        given = changed("lora_variant", "peft_config", "quantize")
        if self.method == "full" and given:
            raise UserError(f"{given[0]} is given, but method is full. Set method: lora, or leave it out.")
        method = self.peft_config.get("peft_type", "LORA")
        given = changed("lora_rank", "lora_alpha", "lora_dropout", "lora_variant")
        if method != "LORA" and given:
            raise UserError(
                f"{given[0]} is given, but peft_config.peft_type is {method}, which takes its settings from "
                f"peft_config alone. Leave one of them out."
            )
        if self.quantize != "none" and self.sharding != "none":
            raise UserError(
                f"sharding is {self.sharding}, but quantize is {self.quantize}, and weights in 4 bits are not spread "
                f"over ranks. Set sharding: none; a base in 4 bits takes little room on each."
            )


RANGES = {
    "1 or more": (
        lambda value: value >= 1,
        "epochs max_steps batch_size gradient_accumulation_steps lora_rank eval_every eval_batch_size metrics_limit "
        "max_new_tokens save_every keep_last logging_every",
    ),
    "0 or more": (  # NaN is not
        lambda value: value >= 0,
        "seed warmup_steps weight_decay max_grad_norm lora_alpha patience z_loss open_encoder_steps",
    ),
    "above 0": (lambda value: value > 0, "learning_rate epsilon rank_timeout distill_temperature"),
    "0 or more and below 1": (lambda value: 0 <= value < 1, "warmup_ratio label_smoothing lora_dropout"),
    "0 to 1": (lambda value: 0 <= value <= 1, "distill_weight"),
}

FIXED_IN_A_RUN = (
    "model model_overrides grow_vocabulary seed packed group_by_length precision method lora_variant lora_rank "
    "lora_alpha lora_targets lora_embeddings peft_config quantize trainable open_encoder_steps teacher distill_weight "
    "distill_temperature best_metric"
).split()
"""A resumed run in which one of these is another value would be another run."""
FREE_IN_A_RUN = "data out resume tokenizer trackers profile rank_timeout debug".split()
"""These do not change what is computed."""


def split_names(names: str) -> list[str]:
    """`"chrf, bleu"` -> `["chrf", "bleu"]`; no names give no list."""
    return [name.strip() for name in names.split(",") if name.strip()]


def parse_recipe(argv: Sequence[str]) -> TrainRecipe:
    """UserError also where an option would be hidden by what a stage says itself."""
    recipe = parse(TrainRecipe, "diptych train", argv)
    for option in given_options(argv):
        for stage in recipe.stages:
            for name in (option, *instead_of(TrainRecipe, option)):
                if name in stage:
                    raise UserError(
                        f"--{option} is given, and stage {stage.get('name')} has {name}: {stage[name]} of its own, "
                        f"which goes before it. Change the stage in the recipe, or leave the option out."
                    )
    return recipe
