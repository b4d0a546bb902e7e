"""The command `diptych`: which subcommands there are, where their settings stand, and where their work is done.

    diptych prepare …     diptych train …     diptych evaluate …     diptych generate …     diptych doctor …

Settings stand in modules that import nothing heavy. The module that does the work is imported once the settings are
known to be good, so that --help and mistakes are answered in a fraction of a second. Exit codes are those of exits.py.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from diptych.data_prep.command_line.arguments import choose_from, parse
from diptych.data_prep.command_line.run_command import run_command, survive_closed_pipes

USAGE = """usage: diptych COMMAND ...

Fine-tuning for encoder-decoders.

{commands}

`diptych COMMAND --help` says what a command takes. `diptych train` runs in this process; on several GPUs or machines,
launch the same loop with: accelerate launch -m diptych.finetune.train --config recipe.yaml"""


class Command(NamedTuple):
    summary: str
    settings: str
    """`module:name` of the settings' class, or of a function that makes settings of an argv."""
    work: str
    """`module:name` of a function that takes the settings and returns an exit code."""
    said_by: str = ""
    """What its messages begin with; its name unless given."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        survive_closed_pipes(is_said=False)
        print(USAGE.format(commands=_list_commands()), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    command, *rest = argv
    if command not in COMMANDS:
        print(f"diptych: there is no command {command!r}. {choose_from(command, list(COMMANDS))}", file=sys.stderr)
        return 2
    return run(command, rest)


def run(name: str, argv: Sequence[str] | None) -> int:
    """The exit code of a command."""
    command = COMMANDS[name]

    def parse_it(words: Sequence[str]) -> Any:
        settings = _named(command.settings)
        return parse(settings, f"diptych {name}", words) if isinstance(settings, type) else settings(words)

    return run_command(
        command.said_by or f"diptych {name}", parse_it, lambda settings: _named(command.work)(settings), argv
    )


def _named(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _list_commands() -> str:
    return "\n".join(f"  {name:10}{command.summary}" for name, command in COMMANDS.items())


DATA, FINETUNE = "diptych.data_prep", "diptych.finetune"
SETTINGS = f"{FINETUNE}.commands.command_settings"
COMMANDS = {
    "prepare": Command(
        "raw rows -> a prepared dataset",
        f"{DATA}.pipeline.prepare_settings:parse_settings",
        f"{DATA}.prepare:run",
        "error",
    ),
    "denoise": Command(
        "raw text -> pairs that `prepare` packs: prefixes, spans, UL2's mixture",
        f"{DATA}.pipeline.prepare_settings:DenoiseSettings",
        f"{DATA}.denoise:run",
    ),
    "train": Command(
        "a prepared dataset and a checkpoint or a new model -> a run folder",
        f"{FINETUNE}.training.recipe:parse_recipe",
        f"{FINETUNE}.train:run",
    ),
    "evaluate": Command(
        "a checkpoint and a prepared split -> loss and metrics",
        f"{SETTINGS}:EvaluateSettings",
        f"{FINETUNE}.evaluating.evaluate_rows:run",
    ),
    "compare": Command(
        "two runs or two reports -> what differs, whether by chance, and curves",
        f"{SETTINGS}:CompareSettings",
        f"{FINETUNE}.evaluating.compare_runs:run",
    ),
    "generate": Command(
        "a prompt, a session or a JSONL file -> text",
        f"{SETTINGS}:GenerateSettings",
        f"{FINETUNE}.inference.generation:run",
    ),
    "inspect": Command(
        "a checkpoint and an input -> a page that shows each step inside",
        f"{SETTINGS}:InspectSettings",
        f"{FINETUNE}.inspecting.inspection:run",
    ),
    "demo": Command(
        "a checkpoint, or two side by side, on a page to try",
        f"{SETTINGS}:DemoSettings",
        f"{FINETUNE}.serving.demo:run",
    ),
    "serve": Command(
        "a checkpoint behind OpenAI's HTTP interface", f"{SETTINGS}:ServeSettings", f"{FINETUNE}.serving.serve:run"
    ),
    "doctor": Command(
        "a checkpoint -> whether its training is right, and what to do if not",
        f"{SETTINGS}:DoctorSettings",
        f"{FINETUNE}.doctor.doctor:run",
    ),
    "publish": Command(
        "a run folder -> its final model on the Hub, with a card",
        f"{SETTINGS}:PublishSettings",
        f"{FINETUNE}.publishing.publish:run",
    ),
    "pair": Command(
        "a decoder-only LLM, or two -> an encoder-decoder", f"{SETTINGS}:parse_pair", f"{FINETUNE}.pairing.pair:run"
    ),
    "merge": Command(
        "an adapter -> a plain checkpoint, with the adapter in its weights",
        f"{SETTINGS}:MergeSettings",
        f"{FINETUNE}.model.merge:run",
    ),
    "export": Command(
        "a checkpoint -> a folder for a faster engine, proven to write the same",
        f"{SETTINGS}:ExportSettings",
        f"{FINETUNE}.exporting.export:run",
    ),
    "tokenizer": Command(
        "texts -> a tokenizer, a report on one, or an extended one",
        f"{DATA}.pipeline.prepare_settings:parse_tokenizer_settings",
        f"{DATA}.tokenizer_tools.tokenizer_command:run",
        "error",
    ),
}

if __name__ == "__main__":
    raise SystemExit(main())
