"""A checkpoint in; a folder for a faster or smaller engine out, proven on the spot.

    diptych export runs/full/final --to ctranslate2 --precision int8 --out exported
    diptych generate exported --engine ctranslate2 --instruction … --input …

    exported/  what the engine reads (export_ctranslate2.py), the tokenizer with its template, generation_config.json
               export.json    what was exported, and the proof, as figures
               README.md      the same as a card
               manifest.json  size and hash of each file

The export is made in float32 first and compared with the torch model in float32 (export_proof.py): greedy tokens on
rows, and logits. If they differ by more than rounding, the command ends with exit code 1 and leaves nothing behind.
Then the precision that was asked for is measured in the same way: what it changes, its size, its speed.
"""

import importlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands import cli
from diptych.finetune.commands.exits import BUG
from diptych.finetune.exporting.export_settings import ExportSettings


class NotTheSameError(UserError):
    """The export was made, and does not write what the model writes."""

    exit_code = BUG


TARGETS = {
    "ctranslate2": "diptych.finetune.exporting.export_ctranslate2",
    "onnx": "diptych.finetune.exporting.export_onnx",
}
"""Modules with `check(model)`, `write(model, tokenizer, folder, precision)` and `open_export(folder, device)`."""


def export(settings: ExportSettings) -> Path:
    """The new folder. UserError for what cannot be expressed, NotTheSameError for an export that proved wrong."""
    import torch  # seconds, that --help need not wait for

    from diptych.data_prep.text_to_ids.templates import attach_template
    from diptych.finetune.model.loading import load_checkpoint, pick_device
    from diptych.finetune.model.merge import new_folder
    from diptych.finetune.run_files.checkpoints import write_new_folder

    out, target = new_folder(settings.out), importlib.import_module(TARGETS[settings.to])
    name, device = os.path.expanduser(settings.model), pick_device(settings.device)
    loaded = load_checkpoint(name, torch.float32, device, settings.template)
    model, tokenizer = loaded.model, loaded.tokenizer
    target.check(model)
    if settings.template:
        attach_template(tokenizer, loaded.template)
    needed = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    write_new_folder(out, lambda folder: _write(folder, settings, target, model, tokenizer), needed)
    return out


def _write(folder: Path, settings: ExportSettings, target: ModuleType, model: Any, tokenizer: Any) -> None:
    """Export, proof and card. What is raised here leaves no folder."""
    from diptych.data_prep.text_to_ids.templates import carried_template
    from diptych.finetune.exporting.export_card import card, lines
    from diptych.finetune.exporting.export_proof import examples_of, task_of
    from diptych.finetune.model.loading import EXPORT_FILE, position_limit
    from diptych.finetune.run_files.checkpoints import write_json, write_text

    template = carried_template(tokenizer)
    examples, described, languages = examples_of(settings.rows, tokenizer, template, position_limit(model))
    task = task_of(model, tokenizer, template, settings.max_new_tokens, settings.batch_size, languages)
    facts = {"model": shown_name(settings.model), "rows": described, "batch_size": task.batch_size}
    facts |= {"torch_bytes": _weight_bytes(settings.model, model)}
    with tempfile.TemporaryDirectory(prefix=".exact-", dir=folder.parent) as beside:
        # In float32 first, whatever is asked for: only there does a difference tell a wrong export from a coarse one.
        place = folder if settings.precision == "float32" else Path(beside)
        facts["float32"] = _exported_and_compared(target, model, tokenizer, examples, task, place, "float32")
    if fault := facts["float32"].pop("fault"):
        raise NotTheSameError(
            f"{settings.model} was exported to {settings.to}, and does not write the same in float32: {fault}. "
            f"Nothing was kept. Please report the model's config; its checkpoint can be used as it is."
        )
    if settings.precision != "float32":
        facts[settings.precision] = _exported_and_compared(
            target, model, tokenizer, examples, task, folder, settings.precision
        )
        del facts[settings.precision]["fault"]
    facts = read_facts(folder) | facts
    write_json(folder / EXPORT_FILE, facts)
    write_text(folder / "README.md", card(facts))
    print("\n".join(lines(facts)))


def _exported_and_compared(
    target: ModuleType, model: Any, tokenizer: Any, examples: list, task: Any, folder: Path, precision: str
) -> dict[str, Any]:
    """Fills `folder`; size, speed and differences of what is in it."""
    from diptych.finetune.exporting.export_proof import compare
    from diptych.finetune.model.families import decoder_start_token
    from diptych.finetune.model.loading import EXPORT_FILE, position_limit
    from diptych.finetune.run_files.checkpoints import write_json

    target.write(model, tokenizer, folder, precision)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    facts = {
        "to": target.NAME,
        "precision": precision,
        "model_type": model.config.model_type,
        "weights": sum(weight.numel() for weight in model.parameters()),
        "decoder_start_token_id": decoder_start_token(model),
        "position_limit": position_limit(model),
    }
    write_json(folder / EXPORT_FILE, facts)
    exported = target.open_export(folder, model.device)
    comparison = compare(model, exported, tokenizer, examples, task)
    computed = {"computed_in": exported.computed_in, "device": model.device.type, "bytes": size}
    return computed | comparison.as_json() | {"fault": comparison.fault()}


def read_facts(folder: Path) -> dict[str, Any]:
    from diptych.finetune.model.loading import EXPORT_FILE
    from diptych.finetune.run_files.checkpoints import read_json

    return read_json(folder / EXPORT_FILE)


def shown_name(model: str) -> str:
    """A Hub id as it is, of a folder the last two parts: the others are this machine's alone."""
    path = Path(model).expanduser()
    return "/".join(path.absolute().parts[-2:]) if path.is_dir() else model


def _weight_bytes(name: str, model: Any) -> int:
    """Of the checkpoint's files; of an adapter, those that it has merged in float32."""
    from diptych.finetune.model.loading import adapter_settings
    from diptych.finetune.model.untrusted_files import MODEL_WEIGHTS, weight_files

    if adapter_settings(os.path.expanduser(name)):
        return sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return sum(file.stat().st_size for file in weight_files(os.path.expanduser(name), MODEL_WEIGHTS))


def run(settings: ExportSettings) -> int:
    out = export(settings)
    print(f"{settings.model} is in {out} ({settings.to}, {settings.precision})")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("export", argv)


if __name__ == "__main__":
    raise SystemExit(main())
