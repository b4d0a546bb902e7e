"""What the training loop works with: one value, made by set_up_run.py, that travels whole."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import accelerate
import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from diptych.data_prep.rows.named_splits import splits_of
from diptych.finetune.batches.packed_rows import PackedRows
from diptych.finetune.batches.padded_rows import BatchOrder, PaddedRows, PreparedData, StepRows
from diptych.finetune.commands.ranks import Ranks
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.run_files.run_folder import Status
from diptych.finetune.run_files.run_log import RunLog
from diptych.finetune.training.optimizers import LearningRates, RunOptimizer
from diptych.finetune.training.recipe import TrainRecipe
from diptych.finetune.training.stop_signals import StopRequest
from diptych.finetune.training.throughput import TokenCost
from diptych.finetune.training.training_batches import DTYPES

NORMS_KEPT, NORMS_NEEDED = 100, 20


@dataclass
class Progress:
    """How far a run is. A checkpoint holds this, the weights, the optimizer and the random states."""

    step: int = 0
    """Optimizer steps taken. The place in the data follows from it."""
    tokens: int = 0
    """Source and target tokens trained on."""
    target_tokens: int = 0
    nats: float = 0.0
    """Summed loss since the last log line. The next three, and `figures`, count from there, too."""
    logged_target_tokens: int = 0
    """With preferences: pairs, or marked answers."""
    logged_tokens: int = 0
    logged_padded_tokens: int = 0
    best: float | None = None
    """The best value of best_metric so far, and its step."""
    best_step: int | None = None
    evaluations_without_gain: int = 0
    evaluated_step: int = 0
    """The step of the last evaluation."""
    norms: list[float] = field(default_factory=list)
    """Lengths of the last gradients, where spikes are skipped, and how many steps were."""
    skipped: int = 0
    figures: list[float] = field(default_factory=list)
    """Sum and count of each of the objective's figures, one after the other."""
    usual_figures: dict[str, float] = field(default_factory=dict)
    """Those of the first log lines, to which later ones are compared."""

    def is_spike(self, norm: float, times: float) -> bool:
        """Whether it is more than so many times the median of those before."""
        return bool(times) and len(self.norms) >= NORMS_NEEDED and norm > times * statistics.median(self.norms)

    def add(self, step: StepRows, loss: float, norm: float | None = None) -> None:
        """Counts one optimizer step; `loss` is in nats per target token, or a mean over pairs or marked answers."""
        self.norms = [*self.norms, norm][-NORMS_KEPT:] if norm is not None else []
        tokens = step.source_tokens + step.target_tokens
        self.step += 1
        self.tokens += tokens
        self.target_tokens += step.target_tokens
        self.nats += loss * step.weight
        self.logged_target_tokens += step.weight
        self.logged_tokens += tokens
        self.logged_padded_tokens += step.padded_tokens


@dataclass(frozen=True)
class Run:
    recipe: TrainRecipe
    folder: Path
    accelerator: accelerate.Accelerator
    prepared: PreparedData
    rows: PaddedRows | PackedRows
    """The training rows."""
    loaded: LoadedModel
    objective: nn.Module
    """Model and loss in one module, wrapped for several ranks."""
    optimizer: RunOptimizer
    rates: LearningRates
    scaler: torch.amp.GradScaler
    """Scales the loss in fp16, whose smallest numbers are too large for gradients; otherwise it does nothing."""
    order: BatchOrder
    work: TokenCost
    peak: float
    """Floating-point operations a second of a matrix product on this rank's device."""
    total_steps: int
    log: RunLog
    progress: Progress
    ranks: Ranks
    stop: StopRequest
    status: Status
    facts: dict[str, object]
    """What decides, beside the recipe, the rows and weights of a step: see resuming.py."""
    _epochs: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        return self.loaded.model

    @property
    def own_objective(self) -> Seq2SeqObjective:
        """Not wrapped."""
        return self.accelerator.unwrap_model(self.objective)

    @property
    def unit(self) -> str:
        """Of the loss."""
        return " nats/token" if self.recipe.objective == "supervised" else ""

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def validation_splits(self) -> list[str]:
        """`validation`, or `validation/news` and the others, where they have names."""
        return splits_of("validation", self.prepared.splits)

    @property
    def weight_names(self) -> dict[nn.Parameter, str]:
        return {weight: name for name, weight in self.model.named_parameters()}

    @property
    def is_out_of_patience(self) -> bool:
        return 0 < self.recipe.patience <= self.progress.evaluations_without_gain

    def step(self, number: int) -> StepRows:
        """The rows of the step that comes after `number` others."""
        epoch, index = divmod(number, self.order.steps_per_epoch)
        if epoch not in self._epochs:
            self._epochs.clear()
            self._epochs[epoch] = self.order.rows_of(epoch)
        return self.order.step(self._epochs[epoch], index)

    def tensors(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """A batch of these training rows on the device of this rank."""
        return {name: tensor.to(self.accelerator.device) for name, tensor in self.rows.tensors(numbers).items()}

    def autocast(self) -> torch.autocast:
        dtype = DTYPES[self.recipe.precision]
        # Of a sharded model, autocast's cache would keep cast copies of weights that are whole for a moment only.
        is_cached = self.recipe.sharding == "none"
        device = self.accelerator.device.type
        return torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=is_cached)
