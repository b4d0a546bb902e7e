"""Writing and reading a run's checkpoints, and its finished model. All ranks call; the main one writes.

save_checkpoint(run)      run/checkpoints/step-000200, written whole or not at all
restore(run, saved)       optimizer and random states of a checkpoint, whose weights are in the model already
write_final(run)          run/final, a copy of the best checkpoint's model, or of the last one's
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import excerpt
from diptych.finetune.commands.exit_codes import CheckpointError
from diptych.finetune.model.adapters import adapter_weights, save_adapter
from diptych.finetune.run_files import atomic_folders, checkpoints
from diptych.finetune.run_files.loss_plot import plot_loss
from diptych.finetune.training.resuming import SavedState
from diptych.finetune.training.run import Run

ROOM = 1.05
"""Times the tensors' own bytes: tokenizer, configs, random states, and the file system's own needs."""
SMALL_FILES = 2**24


def save_checkpoint(run: Run) -> None:
    """A sound checkpoint of this step stays: it was written when the run stopped before its evaluation, and the
    weights are the same."""
    progress, folder = run.progress, run.checkpoints
    path = checkpoints.checkpoint_path(folder, progress.step)
    waiting = run.ranks.waiting_for(f"the checkpoint of step {progress.step}")
    with waiting, run.optimizer.evaluated_weights() as trained:
        random_states = gather_object([checkpoints.random_states()])
        is_writer = run.accelerator.is_main_process
        weights = model_tensors(run.model, keep=is_writer)
        states = run.optimizer.tensors(trained, keep=is_writer)

        def write(partial: Path) -> None:
            save_model(run.model, run.loaded.tokenizer, partial / "model", weights)
            save_file(states, partial / "optimizer.safetensors")
            atomic_folders.write_json(partial / "rng.json", random_states)
            state = {
                "progress": asdict(progress),
                "run": run.facts,
                "written": run.log.bytes_written(),
                "scaler": run.scaler.state_dict(),
                "optimizer": run.optimizer.counters(),
                checkpoints.FILES: atomic_folders.manifest_of(partial),
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


def restore(run: Run, saved: Path, state: SavedState) -> None:
    """Optimizer, scaler of the loss and random states."""
    run.optimizer.load(saved / "optimizer.safetensors", state.optimizer)
    rank, ranks = run.accelerator.process_index, run.accelerator.num_processes
    try:
        run.scaler.load_state_dict(state.scaler)
        random_states = list(atomic_folders.read_json(saved / "rng.json"))
        if rank < len(random_states):
            checkpoints.restore_random_states(random_states[rank])
    except (LookupError, ValueError, TypeError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{saved / 'rng.json'} holds no random states of rank {rank}, or state.json no state of a scaler:"
            f" {excerpt(error)}. Name another checkpoint."
        ) from error
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
    best_step, final = run.progress.best_step if run.recipe.final == "best" else None, run.folder / "final"
    chosen = [checkpoints.checkpoint_path(run.checkpoints, run.progress.step if best_step is None else best_step)]
    which = "the last" if best_step is None else f"the best by {run.recipe.best_metric}"
    if run.recipe.final == "average":
        chosen = checkpoints.complete_checkpoints(run.checkpoints)[-run.recipe.keep_last :]
        which = "the mean of their weights, of which no loss was measured: diptych evaluate"
    with run.ranks.waiting_for("the final model"):
        if run.accelerator.is_main_process:
            for path in chosen:
                checkpoints.check_checkpoint(path)
            if len(chosen) == 1:
                atomic_folders.copy_folder(chosen[0] / "model", final)
            else:
                write_mean([path / "model" for path in chosen], final)
            plot_loss(run.folder / "metrics.jsonl", run.folder / "loss.png")
        run.accelerator.wait_for_everyone()
    names = ", ".join(path.name for path in chosen)
    run.log.say(f"final model: {final} ({names}, {which}) | {run.folder / 'loss.png'}")


def write_mean(models: list[Path], target: Path) -> None:
    """The last one's folder, with the mean of all their weights."""
    atomic_folders.check_own(target)

    def write(partial: Path) -> None:
        shutil.copytree(models[-1], partial, dirs_exist_ok=True)
        for file in partial.glob("*.safetensors"):
            total = load_file(file)
            for model in models[:-1]:
                for name, weight in load_file(model / file.name).items():
                    total[name] = total[name].to(torch.float64).add_(weight) if weight.is_floating_point() else weight
            mean = {
                name: (value / len(models)).to(torch.float32) if value.is_floating_point() else value
                for name, value in total.items()
            }
            save_file(mean, file, {"format": "pt"})

    atomic_folders.write_folder(target, write, sum(file.stat().st_size for file in models[-1].rglob("*")))
