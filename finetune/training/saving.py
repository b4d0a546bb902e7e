"""What a run commits: a checkpoint at a step, and the finished model at the end. All ranks call; the main one writes.

save_checkpoint(run)      run/checkpoints/step-000200, whole or not there, read back before an older one goes
write_final(run)          run/final, a copy of the best checkpoint's model, or of the last one's
restore(run, saved)       optimizer and random states of a checkpoint, whose weights are in the model already
"""

from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.finetune.model.adapters import adapter_weights, save_adapter
from diptych.finetune.run_files import checkpoints, whole_folders
from diptych.finetune.run_files.loss_plot import plot_loss
from diptych.finetune.training.resuming import run_facts
from diptych.finetune.training.set_up import Run

ROOM = 1.05
"""Times the tensors' own bytes: tokenizer, configs, random states, and what the file system wants for itself."""
SMALL_FILES = 2**24


def save_checkpoint(run: Run) -> None:
    """Where there is one of this step already (it was written when a run stopped before its evaluation), that stays:
    the weights are the same."""
    progress, folder = run.progress, run.checkpoints
    path = checkpoints.checkpoint_path(folder, progress.step)
    with run.ranks.waiting_for(f"the checkpoint of step {progress.step}"):
        random_states = gather_object([checkpoints.random_states()])
        is_writer = run.accelerator.is_main_process
        weights = model_tensors(run.model, keep=is_writer)
        states = checkpoints.optimizer_tensors(run.optimizer, run.weight_names, keep=is_writer)
        if is_writer:
            if not path.is_dir() or whole_folders.fault_of(path):
                checkpoints.write_checkpoint(
                    path,
                    lambda partial: _write(run, partial, weights, states, random_states),
                    bytes_needed=int(ROOM * (_bytes(weights) + _bytes(states))) + SMALL_FILES,
                )
            if progress.best_step is not None:
                checkpoints.mark_best(folder, progress.best_step, run.recipe.best_metric, progress.best)
            checkpoints.prune_checkpoints(folder, run.recipe.keep_last)
            run.status.update(step=progress.step)
        run.accelerator.wait_for_everyone()


def _write(
    run: Run,
    partial: Path,
    weights: dict[str, torch.Tensor],
    states: dict[str, torch.Tensor],
    random_states: list[dict],
) -> None:
    save_model(run.model, run.tokenizer, partial / "model", weights)
    checkpoints.save_tensors(partial / "optimizer.safetensors", states)
    whole_folders.write_json(partial / "rng.json", random_states)
    state = {
        "progress": asdict(run.progress),
        "run": run_facts(run.prepared, run.order, run.base_hash),
        "written": run.log.bytes_written(),
        "scaler": run.scaler.state_dict(),
    }
    whole_folders.write_json(partial / "state.json", state)


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    """What is tied counts once."""
    sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors.values()}
    return sum(sizes.values())


def model_tensors(model: PreTrainedModel | PeftModel, keep: bool = True) -> dict[str, torch.Tensor]:
    """What is saved of a model, whole and on the CPU: of an adapted one what the adapter adds. What was tied still
    shares its memory, by which save_pretrained knows it. `keep`: see checkpoint.whole."""
    tensors = adapter_weights(model) if isinstance(model, PeftModel) else model.state_dict(keep_vars=True)
    put_together: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in put_together:
            put_together[id(tensor)] = checkpoints.whole(tensor, keep)
    return {name: put_together[id(tensor)] for name, tensor in tensors.items()}


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """`weights` are those of `model_tensors`, if they have been put together already."""
    weights = weights or model_tensors(model)
    if isinstance(model, PeftModel):
        save_adapter(model, folder, weights)
    else:
        model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def write_final(run: Run) -> None:
    best_step = run.progress.best_step if run.recipe.final == "best" else None
    best = None if best_step is None else checkpoints.checkpoint_path(run.checkpoints, best_step)
    chosen = best or checkpoints.complete_checkpoints(run.checkpoints)[-1]
    with run.ranks.waiting_for("the final model"):
        if run.accelerator.is_main_process:
            checkpoints.check_checkpoint(chosen)
            whole_folders.copy_folder(chosen / "model", run.folder / "final")
            plot_loss(run.folder / "metrics.jsonl", run.folder / "loss.png")
        run.accelerator.wait_for_everyone()
    which = f"the best by {run.recipe.best_metric}" if best else "the last"
    run.log.say(f"final model: {run.folder / 'final'} ({chosen.name}, {which}) | {run.folder / 'loss.png'}")
