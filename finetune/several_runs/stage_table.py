"""Quality, size and speed of each model of a distillation, on the same sources, and the table of them.

    | model        | weights | MB    | token_error_rate  | rows/s | tokens/s |
    | ------------ | ------- | ----- | ----------------- | ------ | -------- |
    | teacher      | 60.4 M  | 241.5 | 21.0 [19.8, 22.2] | 31.4   | 307      |
    | student int8 | 8.4 M   | 8.5   | 19.7 [18.5, 20.8] | 449.2  | 4,398    |

Each model writes greedily, in batches of one size, with torch in the checkpoint's type or with CTranslate2 in that of
the export. Seconds are those of generation alone, after a first row that is not counted.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.finetune.commands import cli
from diptych.finetune.commands.model_settings import split_names
from diptych.finetune.evaluating.confidence_intervals import bootstrap_intervals
from diptych.finetune.evaluating.evaluate_rows import CAP_OVER_LONGEST_TARGET
from diptych.finetune.evaluating.metrics import count_texts, figures_and_signatures
from diptych.finetune.exporting.export_settings import ExportSettings
from diptych.finetune.inference.engine import EncodedPrompt, TorchEngine
from diptych.finetune.inference.generate_settings import GenerateSettings
from diptych.finetune.inference.prompts import Prompter, prompt_of
from diptych.finetune.inference.target_tokens import given_tokens
from diptych.finetune.model.loading import EXPORT_FILE, pick_device
from diptych.finetune.run_files.atomic_folders import read_json, write_json, write_text
from diptych.finetune.several_runs.distil_settings import DistilSettings
from diptych.finetune.several_runs.written_rows import Row, write_jsonl

COLUMNS = ("model", "weights", "MB", "rows/s", "tokens/s")


def open_engine(model: str, settings: DistilSettings) -> TorchEngine:
    """torch for a checkpoint, CTranslate2 for the folder of an export; it runs on a CPU unless there is a CUDA GPU."""
    is_export = (Path(model) / EXPORT_FILE).is_file()
    device = pick_device(settings.device)
    return cli.imported(cli.ENGINES["ctranslate2" if is_export else "torch"])(model, "auto", device, "")


def encoded(engine: TorchEngine, rows: Sequence[Row]) -> list[EncodedPrompt]:
    prompter = Prompter(engine.tokenizer, engine.template, engine.max_source_tokens)
    rendered = [prompter.render(prompt_of(row)) for row in rows]
    ids, _ = prompter.encode([text for text, _ in rendered], [languages for _, languages in rendered])
    return [
        EncodedPrompt(of_row, given_tokens(engine, languages))
        for of_row, (_, languages) in zip(ids, rendered, strict=True)
    ]


def measure(name: str, model: str, rows: Sequence[Row], settings: DistilSettings, out: Path) -> dict[str, Any]:
    """Figures of a model on `rows` with `references`; they are kept in out/NAME.json, the answers beside it."""
    file = out / f"{name.replace(' ', '-')}.json"
    if file.is_file():
        return read_json(file)
    out.mkdir(parents=True, exist_ok=True)
    engine = open_engine(model, settings)
    prompts, metrics = encoded(engine, rows), split_names(settings.metrics)
    longest = max(len(engine.tokenizer(text)["input_ids"]) for row in rows for text in row["references"])
    most = min(math.ceil(CAP_OVER_LONGEST_TARGET * longest), engine.max_target_tokens or 10**6)
    asked = GenerateSettings(model, batch_size=settings.batch_size, max_new_tokens=most)
    engine.generate(prompts[:1], asked, seed=0)
    began = time.perf_counter()
    outputs = engine.generate(prompts, asked, seed=0)
    seconds = time.perf_counter() - began
    texts, references = [output.text for output in outputs], [row["references"] for row in rows]
    counted = count_texts(
        metrics, texts, references, [row["input"] for row in rows], settings.settings_of(settings.metrics)
    )
    figures, signatures = figures_and_signatures(counted.values())
    found = {
        "model": name,
        "folder": model,
        **_size(engine, model),
        "rows": len(rows),
        "figures": figures,
        "intervals": {metric: list(bounds) for metric, bounds in bootstrap_intervals(counted).items()},
        "signatures": signatures,
        "unfinished": sum(not output.finished for output in outputs),
        "rows_per_second": len(rows) / seconds,
        "tokens_per_second": sum(len(output.ids) for output in outputs) / seconds,
    }
    answers = [{**row, "prediction": text} for row, text in zip(rows, texts, strict=True)]
    write_jsonl(file.with_suffix(".predictions.jsonl"), answers)
    write_json(file, found)
    return found


def _size(engine: TorchEngine, model: str) -> dict[str, float]:
    """Weights, and the megabytes that they take: in memory as loaded, or in the file of an export."""
    if (Path(model) / EXPORT_FILE).is_file():
        facts = read_json(Path(model) / EXPORT_FILE)
        return {"weights": facts["weights"], "megabytes": (Path(model) / "model.bin").stat().st_size / 1e6}
    weights = list(engine.loaded.model.parameters())
    return {
        "weights": sum(it.numel() for it in weights),
        "megabytes": sum(it.numel() * it.element_size() for it in weights) / 1e6,
    }


def table(stages: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each model, a column for each figure with its interval."""
    names = list(stages[0]["figures"])
    lines = [[*COLUMNS[:3], *names, *COLUMNS[3:]]]
    for stage in stages:
        scores = []
        for name in names:
            bounds = stage["intervals"].get(name)
            spread = " [{:.1f}, {:.1f}]".format(*bounds) if bounds else ""
            scores.append(f"{stage['figures'][name]:.1f}{spread}")
        lines.append(
            [
                *(stage["model"], f"{stage['weights'] / 1e6:.1f} M", f"{stage['megabytes']:.1f}", *scores),
                *(f"{stage['rows_per_second']:,.1f}", f"{stage['tokens_per_second']:,.0f}"),
            ]
        )
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def write_table(stages: Sequence[Mapping[str, Any]], out: Path) -> str:
    found = table(stages)
    write_json(out / "table.json", list(stages))
    write_text(out / "table.md", found + "\n")
    return found


def export_settings(model: Path, out: Path, settings: DistilSettings) -> dict[str, Any]:
    """Of `diptych export`."""
    asked = ExportSettings(str(model), out=str(out), precision=settings.precision)
    return {name: getattr(asked, name) for name in ("model", "to", "out", "precision")}
