"""Loss and gradient of one optimizer step, divided in different ways; they must not depend on how it was divided.

    whole = objective_step(objective, [batch], target_tokens)
    eight = objective_step(objective, eight_batches, target_tokens)
    compare(whole, eight)
    ->  {"loss": 2.31, "other_loss": 2.31, "loss_ratio": 1.0, "gradient_ratio": 1.0, "cosine": 1.0}

The ways: micro-batches through our objective; two processes, as DDP joins them in our loop; micro-batches and two
processes through transformers' own Seq2SeqTrainer. No weight is changed, and dropout is off.

What the Trainer does (transformers 5.23, 8 micro-batches of one row each, against one batch of 8 rows):

    family        logged loss    gradient's cosine
    T5            × 8.09         0.715              these take **kwargs, so the Trainer assumes that they divide their
    BART          × 7.77         0.787              loss by num_items_in_batch, and adds up eight means
    M2M100        × 8.30         0.763
    Diptych       × 1.000000     1.0000000          these do divide
    T5Gemma       × 1.000000     1.0000000
"""

import gc
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.spawn import ProcessException
from transformers import PreTrainedModel

from diptych.finetune.batches.padded_rows import pad_batch
from diptych.finetune.model.loading import load_model
from diptych.finetune.model.loss import Seq2SeqObjective

RANKS = 2
LONGEST_FOLDER_OF_SOCKETS = 70
RANKS_SECONDS = 300
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
"""Of the gradient's length: fp32 sums in another order differ by up to 1e-5 in small, sharp models."""
COSINE_TOLERANCE = 1e-6

Batch = dict[str, torch.Tensor]


class ExaminedRows(NamedTuple):
    """The rows of the step, and what pads and starts them."""

    rows: Sequence[Mapping[str, Any]]
    pad_token_id: int
    start_token: int

    @property
    def target_tokens(self) -> int:
        return sum(len(row["labels"]) for row in self.rows)

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        return pad_batch(rows, self.pad_token_id, self.start_token)


class LossAndGradients(NamedTuple):
    loss: float
    gradients: dict[str, torch.Tensor]
    """By the weight's name, on the CPU."""


def take_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients, which are removed from the model."""
    found = {name: weight.grad.cpu() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def objective_step(objective: Seq2SeqObjective, batches: Sequence[Batch], target_tokens: int) -> LossAndGradients:
    """All micro-batches of a step, through the objective that training uses."""
    loss = 0.0
    for batch in batches:
        part = objective(batch, target_tokens)
        part.backward()
        loss += part.item()
    return LossAndGradients(loss, take_gradients(objective.model))


def compare(one: LossAndGradients, other: LossAndGradients) -> dict[str, float]:
    """`other` as a multiple of `one`, in loss and in the gradient's length; and the cosine of the two gradients."""
    product = one_square = other_square = 0.0
    for name in one.gradients.keys() | other.gradients.keys():
        first, second = (step.gradients.get(name, torch.zeros(())).double() for step in (one, other))
        one_square += first.square().sum().item()
        other_square += second.square().sum().item()
        product += (first * second).sum().item()
    return {
        "loss": one.loss,
        "other_loss": other.loss,
        "loss_ratio": _ratio(other.loss, one.loss),
        "gradient_ratio": _ratio(math.sqrt(other_square), math.sqrt(one_square)),
        "cosine": _ratio(product, math.sqrt(one_square * other_square)),
    }


def _ratio(number: float, of: float) -> float:
    return number / of if of else math.nan


def agree(figures: Mapping[str, float]) -> bool:
    """Losses below 1 nat are compared as if they were 1: that of memorised rows is mostly rounding."""
    loss = abs(figures["loss"] - figures["other_loss"]) <= LOSS_TOLERANCE * max(1.0, abs(figures["loss"]))
    length = abs(figures["gradient_ratio"] - 1) <= GRADIENT_TOLERANCE
    return loss and length and figures["cosine"] >= 1 - COSINE_TOLERANCE


# transformers' own Trainer


def trainer_step(
    model: PreTrainedModel,
    step: ExaminedRows,
    micro_batches: int,
    folder: Path,
    ranks: int = 1,
    **trainer_arguments: Any,
) -> LossAndGradients:
    """The loss that a stock Seq2SeqTrainer logs for one step over all rows, and its gradient, before any clipping. The
    model is on the CPU; batches have decoder_input_ids, as DataCollatorForSeq2Seq(model=model) gives them. With
    several ranks, each process calls this."""
    from accelerate.state import AcceleratorState
    from transformers import PrinterCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

    class KeepGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.gradients = take_gradients(model)

    keep = KeepGradients()
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=len(step.rows) // (micro_batches * ranks),
        gradient_accumulation_steps=micro_batches,
        learning_rate=0.0,
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        log_level="error",
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=list(step.rows),
        data_collator=step.batch,
        callbacks=[keep],
        **trainer_arguments,
    )
    trainer.remove_callback(PrinterCallback)
    model.eval()
    model.train = lambda mode=True: (
        model
    )  # no dropout, though the Trainer switches to training mode before each forward
    try:
        trainer.train()
    finally:
        del model.train
        # which has the CPU as device, for later Accelerators too
        AcceleratorState._reset_state(reset_partial_state=True)
    return LossAndGradients(trainer.state.log_history[0]["loss"], keep.gradients)


# Two ranks


def compare_ranks(way: str, model_folder: Path, step: ExaminedRows, folder: Path) -> dict[str, float]:
    """`compare` of one process and two. The way is "ours" or "trainer".

    Raises:
        RuntimeError: a process failed, with the last line of its traceback, or both took too long.
    """
    folder = folder / f"ranks-{way}"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (way, str(model_folder), tuple(step), folder, port)
    # Their server imports once what all four of them need: seconds each. Its socket lies in a temporary folder, and
    # the system allows no long paths of sockets.
    has_server = "forkserver" in torch.multiprocessing.get_all_start_methods()
    method = "forkserver" if has_server and len(get_temp_dir()) <= LONGEST_FOLDER_OF_SOCKETS else "spawn"
    torch.multiprocessing.set_forkserver_preload([__name__, "transformers.trainer_seq2seq"])
    ranks = torch.multiprocessing.start_processes(run_rank, arguments, RANKS, join=False, start_method=method)
    deadline = time.monotonic() + RANKS_SECONDS
    try:
        while not ranks.join(timeout=1.0):  # which ends the other process if one fails
            if time.monotonic() > deadline:
                raise RuntimeError(f"the two ranks had not ended after {RANKS_SECONDS} s")
    except ProcessException as error:
        raise RuntimeError(f"rank {error.error_index} failed: {str(error).strip().splitlines()[-1]}") from error
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()
    return json.loads((folder / "compared.json").read_text())


def run_rank(rank: int, way: str, model_folder: str, step: tuple[Any, ...], folder: Path, port: int) -> None:
    """What each of the two processes does."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # logs and progress bars
    os.dup2(nowhere, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    step = ExaminedRows(*step)
    objective = Seq2SeqObjective(load_model(model_folder, torch.float32)).eval()  # without what routers add
    # Before DDP, and with all rows as one batch, which the Trainer scales rightly, too.
    alone = objective_step(objective, [step.batch(step.rows)], step.target_tokens)
    if way == "ours":
        together = _ddp_step(objective, step, rank)
    else:
        together = trainer_step(objective.model, step, 1, folder / f"trainer-{rank}", RANKS)
    gc.collect()  # DDP has to go before its process group: see commands/ranks.py
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if rank == 0:
        (folder / "compared.json").write_text(json.dumps(compare(alone, together)))


def _ddp_step(objective: Seq2SeqObjective, step: ExaminedRows, rank: int) -> LossAndGradients:
    """Half of the rows, uneven in tokens. The loss is multiplied by the ranks, since DDP takes the mean (loop.py)."""
    torch.distributed.init_process_group("gloo")
    joined = nn.parallel.DistributedDataParallel(objective, find_unused_parameters=not objective.uses_all_weights)
    half = len(step.rows) // RANKS
    loss = joined(step.batch(step.rows[half * rank : half * (rank + 1)]), step.target_tokens)
    (loss * RANKS).backward()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return LossAndGradients(total.item(), take_gradients(objective.model))
