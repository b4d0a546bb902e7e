"""A checkpoint in; a folder for a faster or smaller engine out, after a proof that it writes the same.

    diptych export runs/full/final --to ctranslate2 --precision int8 --out exported
    diptych generate exported --engine ctranslate2 --instruction … --input …

    exported/  what the engine reads (export_ctranslate2.py), the tokenizer with its template, generation_config.json
               export.json    what was exported, and the figures of the proof
               manifest.json  size and hash of each file

The export is made in float32 first and compared with the torch model in float32 (export_proof.py). If they differ by
more than rounding, the command ends with exit code 1 and keeps nothing. Then the precision that was asked for is
measured in the same way: how many tokens it changes, its size, its speed.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.templates import attach_template
from diptych.finetune.commands.exit_codes import BUG
from diptych.finetune.exporting import export_ctranslate2, export_onnx
from diptych.finetune.exporting.export_proof import ExportComparison, compare_export, greedy_rules, proof_rows
from diptych.finetune.exporting.export_settings import ExportSettings
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import EXPORT_FILE, adapter_settings, load_checkpoint, pick_device
from diptych.finetune.model.merge import new_folder
from diptych.finetune.model.untrusted_files import MODEL_WEIGHTS, weight_files
from diptych.finetune.run_files.atomic_folders import write_folder, write_json

TARGETS: dict[str, ModuleType] = {"ctranslate2": export_ctranslate2, "onnx": export_onnx}
"""Each has `check(model)`, `token_limit(model)`, `write(loaded, folder, precision)`, `open_export(folder, loaded)`."""


class NotTheSameError(UserError):
    """The export was made, but does not write what the model writes."""

    exit_code = BUG


def export(settings: ExportSettings) -> Path:
    """The new folder. UserError for a model that cannot be exported, NotTheSameError if the proof fails."""
    out = new_folder(settings.out)
    name, device = os.path.expanduser(settings.model), pick_device(settings.device)
    loaded = load_checkpoint(name, torch.float32, device, settings.template)
    TARGETS[settings.to].check(loaded.model)
    if settings.template:
        attach_template(loaded.tokenizer, loaded.template)
    write_folder(out, lambda folder: _write(folder, settings, loaded), _weight_bytes(loaded.model))
    return out


def _write(folder: Path, settings: ExportSettings, loaded: LoadedModel) -> None:
    """Export and proof. If this raises, no folder is left."""
    model, target = loaded.model, TARGETS[settings.to]
    name = os.path.expanduser(settings.model)
    is_adapter = bool(adapter_settings(name))  # whose weights are merged, in float32
    files = [] if is_adapter else weight_files(name, MODEL_WEIGHTS)
    limit = target.token_limit(model)
    rows, described, languages = proof_rows(settings.rows, loaded, limit)
    tokens = min(settings.max_new_tokens, limit or settings.max_new_tokens)
    rules = greedy_rules(loaded, tokens, settings.batch_size, languages)
    facts = {
        "to": settings.to,
        "precision": settings.precision,
        "model": shown_name(settings.model),
        "model_type": model.config.model_type,
        "weights": sum(weight.numel() for weight in model.parameters()),
        "decoder_start_token_id": loaded.decoder_start_token_id,
        "position_limit": limit,
        "rows": described,
        "batch_size": rules.batch_size,
        "torch_bytes": _weight_bytes(model) if is_adapter else sum(file.stat().st_size for file in files),
    }

    def measure(place: Path, precision: str) -> ExportComparison:
        """Exports into `place`, and adds size, speed and differences of that to the facts."""
        target.write(loaded, place, precision)
        size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        loaded.tokenizer.save_pretrained(place)
        model.generation_config.save_pretrained(place)
        write_json(place / EXPORT_FILE, facts)
        exported = target.open_export(place, loaded)
        comparison = compare_export(loaded, exported, rows, rules)
        computed = {"computed_in": exported.computed_in, "device": loaded.device.type, "bytes": size}
        facts[precision] = computed | asdict(comparison)
        return comparison

    with tempfile.TemporaryDirectory(prefix=".exact-", dir=folder.parent) as beside:
        # float32 first: only there a difference means a wrong export and not a coarse one
        fault = measure(folder if settings.precision == "float32" else Path(beside), "float32").fault()
    if fault:
        raise NotTheSameError(
            f"{settings.model} was exported to {settings.to}, and does not write the same in float32: {fault}. "
            f"Nothing was kept. Please report the model's config; its checkpoint can be used as it is."
        )
    if settings.precision != "float32":
        measure(folder, settings.precision)
    write_json(folder / EXPORT_FILE, facts)
    print("\n".join(lines(facts)))


def shown_name(model: str) -> str:
    """A Hub id as it is; of a folder the last two parts, because the others belong to this machine."""
    path = Path(model).expanduser()
    return "/".join(path.absolute().parts[-2:]) if path.is_dir() else model


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """What the command prints:

    runs/full: diptych, 60.5 M weights, to ctranslate2; compared on 12 rows of rows.jsonl
    float32  12 of 12 rows the same, 402 of 402 tokens; logits off by 2.1e-05 at most, of 14.2
    int8     10 of 12 rows the same …
    """
    measured = {precision: facts[precision] for precision in dict.fromkeys(("float32", facts["precision"]))}
    width = max(map(len, measured)) + 2
    yield (
        f"{facts['model']}: {facts['model_type']}, {facts['weights'] / 1e6:.1f} M weights, to {facts['to']}; compared "
        f"on {facts['rows']}"
    )
    for precision, figures in measured.items():
        tied = f" ({figures['tied_rows']} part at a tie)" if figures["tied_rows"] else ""
        yield (
            f"{precision:{width}}{figures['same_rows']} of {figures['rows']} rows the same{tied}, "
            f"{figures['same_tokens']} of {figures['tokens']} tokens; logits off by "
            f"{figures['max_logit_difference']:.2g} at most, of {figures['largest_logit']:.3g}"
        )
        if figures["same_rows"] < figures["rows"]:
            texts = figures["texts"]
            yield f"{'':{width}}BLEU {texts['bleu']:.2f}, chrF {texts['chrf']:.2f} against torch's texts"
    ours, theirs = figures["torch_figures"], figures["exported_figures"]
    if ours:
        yield (
            f"{'':{width}}against the references BLEU {ours['bleu']:.2f} -> {theirs['bleu']:.2f}, "
            f"chrF {ours['chrf']:.2f} -> {theirs['chrf']:.2f}"
        )
    yield f"{'size':{width}}{facts['torch_bytes'] / 1e6:,.1f} MB -> {figures['bytes'] / 1e6:,.1f} MB"
    yield (
        f"{'speed':{width}}{figures['torch_tokens_per_second']:,.0f} -> {figures['exported_tokens_per_second']:,.0f} "
        f"tokens/s on {figures['device']} in batches of {facts['batch_size']}, computed in {figures['computed_in']}"
    )


def run(settings: ExportSettings) -> int:
    out = export(settings)
    print(f"{settings.model} is in {out} ({settings.to}, {settings.precision})")
    return 0
