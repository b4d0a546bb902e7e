"""One optimizer step's loss and gradient, cut in different ways; they must not depend on how it was cut.

    whole = objective_step(objective, [batch], target_tokens)
    eight = objective_step(objective, eight_batches, target_tokens)
    compare(whole, eight)
    ->  {"loss": 2.31, "other_loss": 2.31, "loss_ratio": 1.0, "gradient_ratio": 1.0, "cosine": 1.0}

The ways: micro-batches through our objective; two processes, as DDP joins them in our loop (this file is what each of
them runs: `python -m diptych.finetune.doctor.doctor_steps FOLDER RANK`); micro-batches through transformers' own
Seq2SeqTrainer. Nothing is learned, and dropout is off.

What the Trainer does (transformers 5.23, 8 micro-batches of one row each, against one batch of 8 rows):

    family        logged loss    gradient's cosine
    T5            × 8.09         0.715              these take **kwargs, so that the Trainer thinks that they divide
    BART          × 7.77         0.787              their loss by num_items_in_batch, and adds up eight means
    M2M100        × 8.30         0.763
    Diptych       × 1.000000     1.0000000          these do divide
    T5Gemma       × 1.000000     1.0000000
"""

import gc
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from diptych.finetune.batches.padded_rows import pad_batch
from diptych.finetune.model.loading import load_model
from diptych.finetune.model.loss import Seq2SeqObjective

RANKS = 2
RANKS_SECONDS = 300
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
"""Of the gradient's length: fp32 sums in another order differ by up to 1e-5 in small, sharp models."""
COSINE_TOLERANCE = 1e-6

Batch = dict[str, torch.Tensor]


class Step(NamedTuple):
    loss: float
    gradients: dict[str, torch.Tensor]
    """By the weight's name, on the CPU."""


def take_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that there are, which the model then has no longer."""
    found = {name: weight.grad.cpu() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def objective_step(objective: Seq2SeqObjective, batches: Sequence[Batch], target_tokens: int) -> Step:
    """All micro-batches of a step, through the objective that training uses."""
    loss = 0.0
    for batch in batches:
        part = objective(batch, target_tokens)
        part.backward()
        loss += part.item()
    return Step(loss, take_gradients(objective.model))


def compare(one: Step, other: Step) -> dict[str, float]:
    """`other` as a multiple of `one`, in loss and in the gradient's length; and the cosine of the two gradients."""
    product = one_square = other_square = 0.0
    for name in one.gradients.keys() | other.gradients.keys():
        first, second = one.gradients.get(name), other.gradients.get(name)
        if first is not None:
            one_square += first.double().square().sum().item()
        if second is not None:
            other_square += second.double().square().sum().item()
        if first is not None and second is not None:
            product += (first.double() * second.double()).sum().item()
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
    """Losses below 1 nat are compared as if they were 1: that of what is known by heart is all rounding."""
    loss = abs(figures["loss"] - figures["other_loss"]) <= LOSS_TOLERANCE * max(1.0, abs(figures["loss"]))
    length = abs(figures["gradient_ratio"] - 1) <= GRADIENT_TOLERANCE
    return loss and length and figures["cosine"] >= 1 - COSINE_TOLERANCE


# transformers' own Trainer


@contextmanager
def _without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """The Trainer switches to training mode before each forward; here that changes nothing."""
    model.eval()
    model.train = lambda mode=True: model
    try:
        yield
    finally:
        del model.train


def trainer_step(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    start_token: int,
    micro_batches: int,
    folder: Path,
    ranks: int = 1,
    **trainer_arguments: Any,
) -> Step:
    """The loss that a stock Seq2SeqTrainer logs for one step over all rows, and its gradient, before any clipping. The
    model is on the CPU; batches have decoder_input_ids, as DataCollatorForSeq2Seq(model=model) gives them. Of several
    ranks, each process calls this."""
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
        per_device_train_batch_size=len(rows) // (micro_batches * ranks),
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
        train_dataset=list(rows),
        data_collator=lambda picked: pad_batch(picked, pad_token_id, start_token),
        callbacks=[keep],
        **trainer_arguments,
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with _without_dropout(model):
            trainer.train()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # it was told to use the CPU, and would tell others
    return Step(trainer.state.log_history[0]["loss"], keep.gradients)


# Two ranks


def compare_ranks(
    way: str,
    model_folder: Path,
    rows: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    start_token: int,
    folder: Path,
) -> dict[str, float]:
    """`compare` of one process and two, which run this file; RuntimeError with what a failed one said last. The way is
    "ours" or "trainer"."""
    folder = folder / f"ranks-{way}"
    folder.mkdir()
    (folder / "step.json").write_text(
        json.dumps(
            {"model": str(model_folder), "rows": list(rows), "pad_token_id": pad_token_id, "start_token": start_token}
        )
    )
    command = [sys.executable, "-m", "diptych.finetune.doctor.doctor_steps", way, str(folder)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if way == "trainer":  # what torchrun would set
        environment |= {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    ranks = []
    try:
        for rank in range(RANKS):
            own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if way == "trainer" else {})
            with open(folder / f"rank-{rank}.log", "wb") as log:
                ranks.append(subprocess.Popen([*command, str(rank)], stdout=log, stderr=log, env=own))
        _wait(ranks, folder)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return json.loads((folder / "compared.json").read_text())


def _wait(ranks: Sequence[subprocess.Popen], folder: Path) -> None:
    """Until all have ended well. When one fails, the others wait for it in vain."""
    deadline = time.monotonic() + RANKS_SECONDS
    while any(process.poll() is None for process in ranks):
        if any(process.returncode for process in ranks) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for number, process in enumerate(ranks):
        if process.returncode:
            said = (folder / f"rank-{number}.log").read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"rank {number} failed: {said[-1] if said else f'exit code {process.returncode}'}")
    if any(process.returncode is None for process in ranks):
        raise RuntimeError(f"the two ranks had not ended after {RANKS_SECONDS} s")


def run_rank(folder: Path, rank: int) -> None:
    """A share of the rows, uneven in tokens; the loss times the ranks, since DDP takes the mean, as in train.py."""
    torch.set_num_threads(1)
    step = json.loads((folder / "step.json").read_text())
    rows = step["rows"]
    target_tokens = sum(len(row["labels"]) for row in rows)
    objective = Seq2SeqObjective(load_model(step["model"], torch.float32).eval())

    def batch(of: Sequence[Mapping[str, Any]]) -> Batch:
        return pad_batch(of, step["pad_token_id"], step["start_token"])

    alone = objective_step(objective, [batch(rows)], target_tokens)
    torch.distributed.init_process_group(
        "gloo",
        init_method=(folder / "meeting").absolute().as_uri(),
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=RANKS_SECONDS),
    )
    joined = nn.parallel.DistributedDataParallel(objective, find_unused_parameters=objective.family is None)
    share = rows[len(rows) * rank // RANKS : len(rows) * (rank + 1) // RANKS]
    loss = joined(batch(share), target_tokens)
    (loss * RANKS).backward()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    together = Step(total.item(), take_gradients(objective.model))
    if rank == 0:
        (folder / "compared.json").write_text(json.dumps(compare(alone, together)))
    del joined  # before the process group: see train.py
    gc.collect()
    torch.distributed.destroy_process_group()


def run_trainer_rank(folder: Path, rank: int) -> None:
    """Half of the rows in the Trainer of this rank. Afterwards rank 0 takes all rows, by our objective, to compare:
    with one batch there is nothing to scale wrongly."""
    torch.set_num_threads(1)
    step = json.loads((folder / "step.json").read_text())
    rows, tokens = step["rows"], (step["pad_token_id"], step["start_token"])
    model = load_model(step["model"], torch.float32).eval()
    together = trainer_step(model, rows, *tokens, 1, folder / f"trainer-{rank}", RANKS)
    gc.collect()  # the Trainer's DDP too
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if rank == 0:
        objective = Seq2SeqObjective(load_model(step["model"], torch.float32).eval())
        alone = objective_step(objective, [pad_batch(rows, *tokens)], sum(len(row["labels"]) for row in rows))
        (folder / "compared.json").write_text(json.dumps(compare(alone, together)))


def main(argv: Sequence[str] | None = None) -> int:
    way, folder, rank = sys.argv[1:] if argv is None else argv
    {"ours": run_rank, "trainer": run_trainer_rank}[way](Path(folder), int(rank))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
