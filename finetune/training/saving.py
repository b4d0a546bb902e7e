"""Writing and reading a run's checkpoints, and its finished model. All ranks call; the main one writes.

save_checkpoint(run)      run/checkpoints/step-000200, written whole or not at all
restore(run, saved)       optimizer and random states of a checkpoint, whose weights are in the model already
write_final(run)          run/final, a copy of the best checkpoint's model, or of the last one's
"""

from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.finetune.commands.exit_codes import CheckpointError
from diptych.finetune.model.adapters import adapter_weights, save_adapter
from diptych.finetune.run_files import atomic_folders, checkpoints
from diptych.finetune.run_files.loss_plot import plot_loss
from diptych.finetune.training.run import Run

ROOM = 1.05
"""Times the tensors' own bytes: tokenizer, configs, random states, and the file system's own needs."""
SMALL_FILES = 2**24


def save_checkpoint(run: Run) -> None:
    """A sound checkpoint of this step stays: it was written when the run stopped before its evaluation, and the
    weights are the same."""
    progress, folder = run.progress, run.checkpoints
    path = checkpoints.checkpoint_path(folder, progress.step)
    with run.ranks.waiting_for(f"the checkpoint of step {progress.step}"):
        random_states = gather_object([checkpoints.random_states()])
        is_writer = run.accelerator.is_main_process
        weights = model_tensors(run.model, keep=is_writer)
        states = checkpoints.optimizer_tensors(run.optimizer, run.weight_names, keep=is_writer)

        def write(partial: Path) -> None:
            save_model(run.model, run.loaded.tokenizer, partial / "model", weights)
            save_file(states, partial / "optimizer.safetensors")
            atomic_folders.write_json(partial / "rng.json", random_states)
            state = {
                "progress": asdict(progress),
                "run": run.facts,
                "written": run.log.bytes_written(),
                "scaler": run.scaler.state_dict(),
            }
            atomic_folders.write_json(partial / "state.json", state)

        if is_writer:
            if checkpoints.checkpoint_fault(path):
                bytes_needed = int(ROOM * (_bytes(weights) + _bytes(states))) + SMALL_FILES
                checkpoints.write_checkpoint(path, write, bytes_needed)
            if progress.best_step is not None:
                checkpoints.mark_best(folder, progress.best_step, run.recipe.best_metric, progress.best)
            checkpoints.prune_checkpoints(folder, run.recipe.keep_last, progress.step, progress.best_step)
            run.status.update(step=progress.step)
        run.accelerator.wait_for_everyone()


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Tied tensors count once."""
    sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors.values()}
    return sum(sizes.values())


def restore(run: Run, saved: Path) -> None:
    """Optimizer and random states."""
    checkpoints.load_optimizer(saved / "optimizer.safetensors", run.optimizer, run.weight_names)
    rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
    try:
        random_states = list(atomic_folders.read_json(saved / "rng.json"))
        if rank < len(random_states):
            checkpoints.restore_random_states(random_states[rank])
    except (LookupError, ValueError, TypeError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{saved / 'rng.json'} holds no random states of rank {rank}: {error!r}") from error
    if ranks != len(random_states):
        run.log.say(f"{len(random_states)} ranks before, {ranks} now: dropout will differ")


def model_tensors(model: PreTrainedModel | PeftModel, keep: bool = True) -> dict[str, torch.Tensor]:
    """The tensors that are saved, whole and on the CPU: all of a model's; of an adapted model, the adapter's. Tied
    ones still share their memory, by which save_pretrained knows them. `keep`: see checkpoints.whole."""
    tensors = adapter_weights(model) if isinstance(model, PeftModel) else model.state_dict(keep_vars=True)
    whole: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in whole:
            whole[id(tensor)] = checkpoints.whole_tensor(tensor, keep)
    return {name: whole[id(tensor)] for name, tensor in tensors.items()}


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """`weights` are those of `model_tensors`, if they are at hand already."""
    weights = weights or model_tensors(model)
    if isinstance(model, PeftModel):
        save_adapter(model, folder, weights)
    else:
        model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def write_final(run: Run) -> None:
    best_step = run.progress.best_step if run.recipe.final == "best" else None
    chosen = checkpoints.checkpoint_path(run.checkpoints, run.progress.step if best_step is None else best_step)
    with run.ranks.waiting_for("the final model"):
        if run.accelerator.is_main_process:
            checkpoints.check_checkpoint(chosen)
            atomic_folders.copy_folder(chosen / "model", run.folder / "final")
            plot_loss(run.folder / "metrics.jsonl", run.folder / "loss.png")
        run.accelerator.wait_for_everyone()
    which = "the last" if best_step is None else f"the best by {run.recipe.best_metric}"
    run.log.say(f"final model: {run.folder / 'final'} ({chosen.name}, {which}) | {run.folder / 'loss.png'}")
