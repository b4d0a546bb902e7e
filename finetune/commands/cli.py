"""The command `diptych`: its subcommands, and for each where its settings and its work stand.

    diptych prepare …     diptych train …     diptych evaluate …     diptych generate …     diptych doctor …

Files of settings import nothing heavy. The module that does the work is imported after the settings were found to be
good, so that --help and mistakes are answered in a fraction of a second. Exit codes are those of exit_codes.py.
"""

import importlib
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NamedTuple

from diptych import __version__
from diptych.data_prep.command_line.arguments import choose_from, parse
from diptych.data_prep.command_line.run_command import guard_streams, run_command
from diptych.finetune.commands.exit_codes import RankError, is_of_another_rank, lost_rank

USAGE = """usage: diptych COMMAND ...

Fine-tuning for encoder-decoders.

{commands}

`diptych COMMAND --help` says what a command takes, and `diptych --version` what is installed. `diptych train`
runs in this process; on several GPUs or machines, launch the same loop with:
accelerate launch -m diptych.finetune.train --config recipe.yaml"""

REPORTED = ("torch", "transformers", "peft", "accelerate")


class Command(NamedTuple):
    summary: str
    settings: str
    """`module:name` of the settings' class, or of a function that makes settings of an argv."""
    work: str
    """`module:name` of a function that takes the settings and returns an exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "--version"):
        guard_streams(is_said=False)
        commands = "\n".join(f"  {name:10}{command.summary}" for name, command in COMMANDS.items())
        is_version = argv == ["--version"]
        print(_versions() if is_version else USAGE.format(commands=commands), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name, *words = argv
    if name not in COMMANDS:
        print(f"diptych: there is no command {name!r}. {choose_from(name, list(COMMANDS))}", file=sys.stderr)
        return 2
    return run(name, words)


def _versions() -> str:
    installed = {it.name: it.version for it in metadata.distributions()}
    others = {it: installed.get(it, "is not installed") for it in REPORTED}
    return "\n".join(map(" ".join, {"diptych": __version__, "python": platform.python_version(), **others}.items()))


def run(name: str, argv: Sequence[str] | None) -> int:
    """The exit code of a command."""
    command = COMMANDS[name]

    def parse_settings(words: Sequence[str]) -> Any:
        settings = imported(command.settings)
        return parse(settings, f"diptych {name}", words) if isinstance(settings, type) else settings(words)

    def work(settings: Any) -> int:
        try:
            return imported(command.work)(settings)
        except RuntimeError as error:
            if not is_of_another_rank(error):
                raise
            raise RankError(f"another rank has ended or does not answer: {lost_rank(error)}") from error

    return run_command(f"diptych {name}", parse_settings, work, argv)


def imported(place: str) -> Any:
    """`finetune.train:run` → what `run` is in diptych.finetune.train."""
    module, name = place.split(":")
    return getattr(importlib.import_module(f"diptych.{module}"), name)


COMMANDS = {
    "prepare": Command(
        "raw rows -> a prepared dataset", "data_prep.pipeline.prepare_settings:parse_settings", "data_prep.prepare:run"
    ),
    "denoise": Command(
        "raw text -> training rows for `prepare`: prefixes, spans, UL2's mixture",
        "data_prep.tokenizer_tools.text_command_settings:DenoiseSettings",
        "data_prep.denoise:run",
    ),
    "train": Command(
        "a prepared dataset and a checkpoint or a new model -> a run folder",
        "finetune.training.recipe:parse_recipe",
        "finetune.train:run",
    ),
    "sweep": Command(
        "a recipe and the settings that vary -> many runs, and the best values",
        "finetune.several_runs.sweep_settings:SweepSettings",
        "finetune.several_runs.sweep:run",
    ),
    "distil": Command(
        "a large teacher and rows -> a small student in int8, and a table of both",
        "finetune.several_runs.distil_settings:DistilSettings",
        "finetune.several_runs.distil:run",
    ),
    "evaluate": Command(
        "a checkpoint and a prepared split -> loss and metrics",
        "finetune.evaluating.evaluate_settings:EvaluateSettings",
        "finetune.evaluating.evaluate_split:run",
    ),
    "compare": Command(
        "two runs or two reports -> the differences, with p-values",
        "finetune.evaluating.evaluate_settings:CompareSettings",
        "finetune.evaluating.compare_runs:run",
    ),
    "generate": Command(
        "a prompt, an interactive session or a file -> text",
        "finetune.inference.generate_settings:GenerateSettings",
        "finetune.generating.generate_command:run",
    ),
    "sample": Command(
        "a file of prompts -> several answers to each",
        "finetune.preferences.preference_settings:parse_sample",
        "finetune.generating.generate_command:run",
    ),
    "rank": Command(
        "several answers to each prompt and a metric -> pairs of a better and a worse one",
        "finetune.preferences.preference_settings:RankSettings",
        "finetune.preferences.rank:run",
    ),
    "inspect": Command(
        "a checkpoint and an input -> a page that shows all steps of the computation",
        "finetune.inspecting.inspect_settings:InspectSettings",
        "finetune.inspecting.inspection:run",
    ),
    "demo": Command(
        "a checkpoint, or two side by side -> a local web page",
        "finetune.serving.serve_settings:DemoSettings",
        "finetune.serving.web_demo:run",
    ),
    "serve": Command(
        "a checkpoint -> a server with OpenAI's HTTP API",
        "finetune.serving.serve_settings:ServeSettings",
        "finetune.serving.serve:run",
    ),
    "doctor": Command(
        "a checkpoint -> checks of its training, and advice",
        "finetune.inspecting.doctor_settings:DoctorSettings",
        "finetune.inspecting.doctor:run",
    ),
    "publish": Command(
        "a run folder -> its final model on the Hub, with a card",
        "finetune.exporting.publish_settings:PublishSettings",
        "finetune.exporting.publish:run",
    ),
    "pair": Command(
        "a decoder-only LLM, or two -> an encoder-decoder",
        "finetune.pairing.pair_settings:parse_pair",
        "finetune.pairing.pair:run",
    ),
    "merge": Command(
        "an adapter -> a plain checkpoint, with the adapter in its weights",
        "finetune.model.merge:MergeSettings",
        "finetune.model.merge:run",
    ),
    "export": Command(
        "a checkpoint -> a folder for a faster engine, compared with the original",
        "finetune.exporting.export_settings:ExportSettings",
        "finetune.exporting.export:run",
    ),
    "tokenizer": Command(
        "texts -> a tokenizer, a report on one, or an extended one",
        "data_prep.tokenizer_tools.text_command_settings:parse_tokenizer_settings",
        "data_prep.tokenizer_tools.tokenizer_command:run",
    ),
}
ENGINES = {
    "torch": "finetune.inference.engine:load_engine",
    "ctranslate2": "finetune.exporting.ctranslate2_engine:load_engine",
}
"""What `diptych generate --engine` names: functions that load what has the methods of a TorchEngine."""

if __name__ == "__main__":
    raise SystemExit(main())
