"""The recipe of a training run: every setting, its unit and its consequence. Field docstrings are the text of --help.

    accelerate launch -m diptych.finetune.train --config recipe.yaml --learning_rate 1e-4

A recipe is YAML; settings on the command line go before it. The run folder has the result as config.yaml. recipes/ has
some to start from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diptych.data_prep.command_line.arguments import check_numbers, given_options, instead_of, parse
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import CHECKPOINT, NAMES, OUTPUT, PREPARED, START
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.preferences.objective_settings import NEED_REFERENCE, OF_SAMPLES, OF_VALIDATION, checked_settings


@dataclass(frozen=True)
class TrainRecipe:
    """Fine-tune an encoder-decoder, or train a Diptych from scratch, on a prepared dataset."""

    model: str = field(default="", metadata=START)
    """The model to start from: a checkpoint folder or Hub id of any AutoModelForSeq2SeqLM, or the name of a new
    Diptych (diptych-8m, -60m, -220m, -770m, -3b), which starts from random weights."""
    model_overrides: dict[str, Any] = field(default_factory=dict)
    """Changes of the config of a new Diptych, such as {residual_dropout: 0.1}; not for checkpoints."""
    data: str = field(default="", metadata=PREPARED)
    """Folder that `diptych prepare` wrote: training uses its split `train`, evaluation its validation sets."""
    out: str = field(default="", metadata=OUTPUT)
    """Run folder; it is created if necessary. It must be empty unless `resume` is set."""
    tokenizer: str | None = field(default=None, metadata=CHECKPOINT)
    """Tokenizer to save with the model. Default: the prepared folder's. The vocabulary must be the same."""
    grow_vocabulary: bool = False
    """If the tokenizer has more tokens than the model has embedding rows, add rows, which LoRA also trains."""
    resume: bool | str = False
    """true: continue from the newest valid checkpoint in `out`, or start if there is none. The folder of an earlier
    checkpoint: continue from it, and move the later ones to checkpoints/aside."""
    seed: int = 0
    """Seed of new weights, the order of rows, and dropout."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Several trainings in sequence: [{name: heal, max_steps: 500, data: …}, {name: instruct, epochs: 2}]. Each uses
    this recipe with its own settings added, is in `out`/stages/, and starts from the model of the previous one."""

    epochs: int | None = field(default=None, metadata={"instead_of": ("max_steps",)})
    """Passes over the training rows. Give this or max_steps; the command line replaces either one in a recipe."""
    max_steps: int | None = field(default=None, metadata={"instead_of": ("epochs",)})
    """Optimizer steps. Give this or epochs."""
    packed: bool = True
    """Train on packed rows, which contain several examples each: the same loss and gradients, several times as fast.
    If the model's family is not packed, or the prepared folder has no packed rows, padded rows are used, and the
    reason is printed."""
    batch_size: int | None = field(default=None, metadata={"instead_of": ("batch_tokens",)})
    """Rows per batch on each rank (a packed row has several examples), 4 by default. More is faster until memory is
    full. An optimizer step has batch_size × gradient_accumulation_steps × ranks rows."""
    batch_tokens: int | Literal["auto"] | None = field(default=None, metadata={"instead_of": ("batch_size",)})
    """Instead of batch_size: at most so many tokens per batch on each rank, source, target and padding. batch_size is
    then batch_tokens divided by the tokens of a packed row; for padded rows, by those of the longest source and target
    together, so most batches have fewer. auto: what fits into the memory of a CUDA GPU in training; evaluation has its
    own eval_batch_size. config.yaml has the batch_size that was found, and a resumed run keeps it."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are added up before an optimizer step: a larger batch without more memory."""
    group_by_length: bool = True
    """For padded rows: put rows of similar length into the same batch. This reduces padding; the order is a little
    less random. Packed rows all have the same length."""

    objective: Literal["supervised", "dpo", "simpo", "cpo", "orpo", "kto", "mrt", "grpo"] = "supervised"
    """What is learned: supervised: the targets. Of pairs of a chosen and a rejected answer: dpo, simpo, cpo, orpo; of
    answers that are marked as liked or not: kto; of answers that the model samples at each step, by a metric: mrt
    (minimum risk training), grpo. See docs/preferences.md."""
    objective_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the objective, such as {beta: 0.1, loss: ipo, label_smoothing: 0.1, supervised_weight: 0.2}."""
    reference: str | None = field(default=None, metadata=CHECKPOINT)
    """dpo, kto, and grpo with kl_weight: the model with which the log-probabilities of answers are compared. Default:
    the model as it starts."""

    learning_rate: float = 3e-4
    """Peak learning rate. From scratch 3e-4 to 1e-3; full fine-tuning 3e-5 to 1e-4; LoRA 1e-4 to 1e-3."""
    schedule: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "polynomial",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ] = "cosine"
    """Learning rate after warm-up, by transformers' names: cosine and linear decay to zero. With optimizer
    schedule_free it must be constant."""
    schedule_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the schedule in transformers: {num_decay_steps: 200} of warmup_stable_decay, {power: 2.0, lr_end:
    1e-6} of polynomial, {num_cycles: 3} of cosine_with_restarts, {min_lr_rate: 0.1} of cosine_with_min_lr."""
    warmup_steps: int = field(default=0, metadata={"instead_of": ("warmup_ratio",)})
    """Steps in which the learning rate rises linearly from zero. Give this or warmup_ratio."""
    warmup_ratio: float = field(default=0.0, metadata={"instead_of": ("warmup_steps",)})
    """The same as a share of all steps, 0 to 1."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor", "muon", "schedule_free"] = "adamw"
    """How weights are updated. adamw_8bit: AdamW's means in 8 bits, 2 bytes per weight instead of 8 (pip install
    bitsandbytes). adafactor: T5's, which keeps almost nothing; learning rates of about 1e-3. muon: orthogonal updates
    of matrices, AdamW for all other weights, with AdamW's learning rates. schedule_free: AdamW that needs no decay of
    the learning rate, and can end at any step (pip install schedulefree)."""
    optimizer_settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the optimizer's class: {momentum: 0.9} of muon, {scale_parameter: true} of adafactor, {r: 0.5} of
    schedule_free. Of muon they are for the matrices."""
    ema: float = 0.0
    """Decay of a running average of the weights, such as 0.999: the average is evaluated and saved. 0: no average."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """bf16: weights, gradients and AdamW's means take 10 bytes per weight instead of 16. What is lost when an update
    is rounded is kept and added later: Kahan summation (pip install torch-optimi). With LoRA: the base in bf16."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW: decay rates of the running means of the gradient and of its square. From scratch, 0.95 to 0.98 is more
    stable for the second."""
    epsilon: float = 1e-8
    """AdamW: added to the root of the second running mean."""
    weight_decay: float = 0.01
    """AdamW: each weight is reduced by this part times the learning rate per step; not norms and biases."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this norm; 0 does not scale."""
    skip_spikes: float = 0.0
    """A step whose gradient norm is more than so many times the median of the last 100 steps is skipped, and this is
    printed; 0: none is. At least 20 steps come before."""
    neftune: float = 0.0
    """NEFTune (arXiv 2310.05914): uniform noise is added to embeddings in training, of this size divided by the root
    of length × width; 5 to 15. 0: no noise."""
    label_smoothing: float = 0.0
    """Part of the target probability that is distributed over all tokens in training, not in validation."""
    z_loss: float = 0.0
    """Weight of the square of the log of the softmax denominator in the loss (PaLM: 1e-4); keeps logits small."""

    trainable: Literal["all", "cross_attention"] = "all"
    """cross_attention: train only the cross-attention, and freeze all other weights: the first stage for a pair with
    `--cross_attention separate`. `patience` stops it when the validation loss no longer falls."""
    open_encoder_steps: int = 0
    """Start with a causal encoder in a Diptych, as in the LLM that it was made from, and make it bidirectional over so
    many steps: at step s of n, a token can attend to s/n of the longest row ahead of it."""
    teacher: str | None = field(default=None, metadata=CHECKPOINT)
    """Folder or Hub id of a model with the same tokenizer, for distillation (arXiv 1503.02531): its predictions are
    added to the loss. An encoder-decoder, or decoder-only, such as the LLM that a pair was made from."""
    distill_weight: float = 0.5
    """With a teacher: weight of its predictions in the loss, 0 to 1. The targets have the rest."""
    distill_temperature: float = 1.0
    """With a teacher: temperature of both predictions; above 1, unlikely tokens have a larger weight."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Data type of the forward pass; weights and optimizer are fp32, unless `weights` is bf16. `auto` measures for
    50 ms and uses the faster of bf16 and fp32; a resumed run keeps it. fp16, with loss scaling, is for GPUs without
    bf16; it is an error for T5 and its relatives (mT5, UMT5, LongT5, Switch, T5Gemma), which overflow in it."""
    attention: Literal["auto", "eager", "sdpa", "flex_attention", "varlen"] = "auto"
    """Implementation of attention. `varlen` computes nothing between examples of a packed row: flash attention on a
    GPU, segment by segment on a CPU. `auto` uses it if family and device support it, else the model's default."""
    global_attention: str = "auto"
    """LED only: which tokens at the start of a source attend to all others: first, none, or how many. It is saved in
    generation_config.json, and used in evaluation and generation, too. auto: as saved there, or else first."""
    sharding: Literal["none", "full"] = "none"
    """With several ranks: none: each rank has the whole model, which is fastest if it fits. full: each rank has a part
    of weights, gradients and optimizer states (FSDP2): 16 bytes per weight, divided by the ranks."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: needs much less memory, and is about a third slower."""
    compile: bool = False
    """torch.compile each layer: takes up to minutes at the start, then steps are faster on a GPU, but not on a CPU.
    Packed rows are compiled once, padded rows again for each new shape."""

    method: Literal["full", "lora"] = "full"
    """Train all weights, or LoRA adapters (arXiv 2106.09685) on a frozen checkpoint."""
    lora_variant: Literal["lora", "rslora", "dora"] = "lora"
    """rslora: a scale for high ranks. dora: trains direction and length of each weight separately; slower, often
    better at low ranks."""
    lora_rank: int = 16
    """Rank of each adapter; memory and disk size are proportional to it."""
    lora_alpha: float = 32.0
    """Scale: the adapter's output is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Probability of dropping an input of an adapter."""
    lora_targets: str = field(default="", metadata=NAMES)
    """Names of the layers that get an adapter, separated by commas. Default: all linear layers of the family."""
    peft_config: dict[str, Any] = field(default_factory=dict)
    """Another method of peft, with its settings: {peft_type: IA3, feedforward_modules: [wo]}; or HRA, LOHA, LOKR,
    MISS, OFT, VERA. For LoRA: rank_pattern, alpha_pattern, exclude_modules."""
    quantize: Literal["none", "4bit"] = "none"
    """4bit: QLoRA (arXiv 2305.14314), the frozen base in 4 bits (nf4) on a CUDA GPU, with bitsandbytes: a fifth of the
    memory. Later, the adapter is loaded onto the base, or merged into it, in the base's own precision."""
    lora_embeddings: bool = False
    """Also train all weights of embeddings and head: for a language with little pretraining data. Such an adapter,
    like one with new tokens, cannot be loaded together with others: `diptych merge` it first."""

    eval_every: int | None = None
    """Steps between evaluations on the validation sets. Default: once per epoch. There is always one at the end."""
    eval_batch_size: int = 16
    """Examples per batch in evaluation on each rank, padded."""
    metrics: str = field(default="", metadata=NAMES)
    """Metrics of generated text at each evaluation, separated by commas: exact_match, token_f1, rouge, bleu, chrf,
    superni_rougeL, token_error_rate (of words or phonemes between spaces). The outputs are saved in samples.jsonl.
    A function of yours: my_module:function, with :min at the end if lower is better; see docs/evaluating.md."""
    metric_settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of metrics: {my_function: {threshold: 3}, bleu: {tokenize: intl}}."""
    metrics_limit: int = 100
    """Rows of each validation set for which text is generated, the same ones each time."""
    max_new_tokens: int | None = None
    """Maximum length of generated outputs. Default: a quarter more than the longest target."""
    best_metric: str = "loss"
    """What selects the best checkpoint: loss, or with `metrics` any of their figures (exact_match, rougeL, chrf …),
    exact_match_rows, or unfinished. With several validation sets, their unweighted mean, or the figure of one set:
    medical/chrf, news/loss."""
    patience: int = 0
    """Number of evaluations without improvement of best_metric after which training stops; 0: never."""

    save_every: int | None = None
    """Steps between checkpoints. Default: once per epoch. A new best one and the last one are always saved."""
    keep_last: int = 2
    """How many of the newest checkpoints to keep. The best one is always kept, too."""
    final: Literal["best", "last", "average"] = "best"
    """Which checkpoint is saved as `final/`; average: the mean weights of the newest `keep_last`. Without a validation
    split, best is the last."""
    logging_every: int = 10
    """Steps between log lines."""
    rank_timeout: float = 1800.0
    """Seconds that a rank waits for the others before the run ends with exit code 6. It must be longer than the time
    to write a checkpoint, because one rank writes and the others wait."""
    debug: bool = False
    """Print the traceback below an error message."""
    profile: bool = False
    """Record three steps with torch.profiler: profile/trace.json (a chrome trace) and profile/table.txt."""
    trackers: str = field(default="", metadata=NAMES)
    """Experiment trackers of accelerate, separated by commas; they must be installed (tensorboard, wandb, mlflow,
    trackio …), and are set up by their own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR)."""
    project: str = "diptych"
    """Name of the project in the trackers."""
    run_name: str | None = None
    """Name of the run in wandb, mlflow, trackio, swanlab and clearml. Default: the name of the folder `out`."""

    def __post_init__(self):
        for name in ("model", "data", "out", "tokenizer", "teacher", "reference"):
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
        if self.batch_size is not None and self.batch_tokens is not None:
            raise UserError("batch_size and batch_tokens are both given. Keep one of them.")
        if self.batch_size is None and self.batch_tokens is None:
            object.__setattr__(self, "batch_size", 4)
        check_numbers(self, RANGES)
        if self.warmup_steps and self.warmup_ratio:
            raise UserError("warmup_steps and warmup_ratio are both given. Keep one of them.")
        self._check_adapter()
        self._check_optimizer()
        if self.teacher and self.label_smoothing:
            raise UserError(
                "label_smoothing is given beside a teacher, whose predictions smooth the targets already. Drop one."
            )
        if self.objective != "supervised":
            if given := self._changed("teacher", "label_smoothing", "z_loss", "neftune"):
                raise UserError(
                    f"{given[0]} is for supervised training, and {self.objective} has objective_settings. Drop it."
                )
            self._check_objective(checked_settings(self.objective, self.objective_settings))
        if self.trainable != "all" and self.method != "full":
            raise UserError(f"trainable is {self.trainable}, but method is {self.method}. Set method: full.")
        if self.metrics:
            # imported here, since the libraries of metrics take seconds
            from diptych.finetune.evaluating.metrics import find_metrics

            find_metrics(split_names(self.metrics), self.metric_settings)
        own_figures = ["loss", *(OF_VALIDATION if self.objective != "supervised" else [])]
        if self.best_metric.rpartition("/")[2] not in own_figures and not self.metrics:
            raise UserError(
                f"best_metric is {self.best_metric}, but no metrics are computed. "
                f"Name them in `metrics`, or choose by loss."
            )

    def _changed(self, *names: str) -> list[str]:
        """Those that are not at their default."""
        return [name for name in names if getattr(self, name) != getattr(TrainRecipe, name, {})]

    def _check_objective(self, settings: dict[str, Any]) -> None:
        """UserError for what does not go with an objective of preferences."""
        is_sampled = self.objective in OF_SAMPLES
        compares = self.objective in NEED_REFERENCE or settings.get("kl_weight")
        of_new = settings.get("kl_weight") and not self.reference and self.model.startswith("diptych-")
        for contradicts, reason in (
            (self.reference and not compares, f"reference is given, but {self.objective} compares with none: drop it"),
            (
                of_new,
                "kl_weight compares with the model as it starts, which is random here: name a reference",
            ),
            (is_sampled and self.sharding == "full", f"{self.objective} samples on each rank: set sharding: none"),
            (is_sampled and self.batch_tokens, f"{self.objective} samples answers: give batch_size, the sources"),
        ):
            if contradicts:
                raise UserError(f"{reason}.")
        if is_sampled:
            from diptych.finetune.evaluating.metrics import find_metrics

            find_metrics(split_names(settings["reward"]), self.metric_settings)

    def _check_optimizer(self) -> None:
        """UserError for settings of the optimizer that would have no effect, or that contradict each other."""
        optimizer, bf16 = self.optimizer, self.weights == "bf16"
        free, in_bf16 = optimizer == "schedule_free", bf16 and self.method == "full"
        for contradicts, reason in (
            (optimizer == "adafactor" and self._changed("betas", "epsilon"), "adafactor has no betas and epsilon"),
            (optimizer == "adamw" and self.optimizer_settings, "adamw has no other settings: drop optimizer_settings"),
            (
                free and not self.schedule.startswith("constant"),
                f"schedule is {self.schedule}, but schedule_free needs no decay: set schedule: constant",
            ),
            (free and self.ema, "schedule_free averages the weights itself: drop ema"),
            (
                self.sharding == "full" and optimizer in ("adafactor", "adamw_8bit"),
                f"{optimizer} cannot update weights that are spread over ranks: set sharding: none",
            ),
            (in_bf16 and optimizer != "adamw", f"{optimizer} does not train weights in bf16: set weights: fp32"),
            (in_bf16 and self.ema, "bf16 cannot hold what an average changes by: drop ema, or set weights: fp32"),
            (bf16 and self.precision not in ("auto", "bf16"), "weights in bf16 need precision: bf16 (or auto)"),
            (bf16 and self.quantize != "none", "weights in 4 bits are not also in bf16: drop weights"),
            (self.method == "lora" and self.final == "average", "adapters are not averaged: set final: best"),
        ):
            if contradicts:
                raise UserError(f"{reason}.")

    def _check_adapter(self) -> None:
        """UserError for a setting of an adapter that would have no effect, or that contradicts another."""
        changed = self._changed
        for needed, (names, off) in NEEDED.items():
            is_off = getattr(self, needed) == off and not any(needed in stage for stage in self.stages)
            if is_off and (given := changed(*names.split())):
                remedy = f"Set {needed}{': lora' if needed == 'method' else ''}, or leave it out."
                raise UserError(f"{given[0]} is given, but {needed} is {off or 'not set'}. {remedy}")
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
        "epochs max_steps batch_size batch_tokens gradient_accumulation_steps lora_rank eval_every eval_batch_size "
        "metrics_limit max_new_tokens save_every keep_last logging_every",
    ),
    "above 0": (lambda value: value > 0, "learning_rate epsilon rank_timeout distill_temperature"),
    "0 or more and below 1": (lambda value: 0 <= value < 1, "warmup_ratio label_smoothing lora_dropout ema betas"),
    "0, or above 1": (lambda value: value == 0 or value > 1, "skip_spikes"),
    "0 to 1": (lambda value: 0 <= value <= 1, "distill_weight"),
}
"""Of all other numbers: 0 or more."""

OF_LORA = "lora_variant lora_rank lora_alpha lora_dropout lora_targets lora_embeddings peft_config quantize"
NEEDED: dict[str, tuple[str, Any]] = {
    "method": (OF_LORA, "full"),
    "teacher": ("distill_weight distill_temperature", None),
    "objective": ("objective_settings reference", "supervised"),
}
"""Settings that have no effect while another one has this value."""

FIXED_IN_A_RUN = (
    "model model_overrides grow_vocabulary seed packed group_by_length precision method lora_variant lora_rank "
    "lora_alpha lora_targets lora_embeddings peft_config quantize trainable open_encoder_steps teacher distill_weight "
    "distill_temperature objective objective_settings reference best_metric global_attention optimizer "
    "optimizer_settings ema weights"
).split()
"""A resumed run in which one of these is another value would be another run."""
FREE_IN_A_RUN = "data out resume tokenizer trackers project run_name profile rank_timeout debug".split()
"""These do not change what is computed."""


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
