"""The command `diptych`, and the two things that its subcommands share: reading settings, and reporting user errors.

    diptych prepare …     diptych train …     diptych evaluate …     diptych generate …     diptych doctor …

Each subcommand is the `main(argv)` of one file and returns its exit code: 0 done, 2 a user's error, told in one
message without a traceback, 130 interrupted. Nothing heavy is imported before a subcommand is known, so that
`diptych --help` answers in a tenth of a second.
"""

import importlib
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from diptych.data_prep.records import UserError, nearest

Settings = TypeVar("Settings")

USAGE = """usage: diptych COMMAND ...

Fine-tuning for encoder-decoders.

{commands}

`diptych COMMAND --help` says what a command takes. `diptych train` runs in this process; on several GPUs or machines,
launch the same loop with: accelerate launch -m diptych.finetune.train --config recipe.yaml"""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE.format(commands=_list_commands()), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    command, *rest = argv
    if command not in COMMANDS:
        print(f"diptych: there is no command {command!r}. {choose_from(command, list(COMMANDS))}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[command]
    try:
        return importlib.import_module(module).main(rest)
    except KeyboardInterrupt:  # while it was still importing
        return 130


def _list_commands() -> str:
    return "\n".join(f"  {name:10}{summary}" for name, (_, summary) in COMMANDS.items())


def choose_from(name: str, known: Sequence[str]) -> str:
    """`Did you mean …? Choose from: …`, the end of a message about a name that is not known."""
    near = nearest(name, known)
    return f"{f'Did you mean {near}? ' if near else ''}Choose from: {', '.join(known)}."


def parse_settings(settings_class: type[Settings], command: str, argv: Sequence[str] | None) -> Settings:
    """The command line as a frozen dataclass: its docstring is the help, its fields' docstrings that of the options.

    A field without a default is a positional argument. What cannot be parsed ends the process with code 2.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=command, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_class_arguments(settings_class, as_positional=True)
    try:
        values = parser.parse_args(argv).as_dict()
        return settings_class(**{name: value for name, value in values.items() if name != "config"})
    except (ArgumentError, UserError) as error:
        print(f"{command}: {' '.join(str(error).split())}{_hint(settings_class, error)}", file=sys.stderr)
        raise SystemExit(2) from error


def _hint(settings_class: type, error: Exception) -> str:
    """What to do next: for an unknown option, on the command line or in YAML, the nearest known one."""
    if not isinstance(error, ArgumentError):
        return ""  # the settings' own checks already say it
    unknown = re.search(r"unrecognized arguments: --([^\s=]+)|Option '(\S+)' is not accepted", str(error))
    if unknown is None:
        return ". See --help."
    return ". " + choose_from(unknown[1] or unknown[2], [setting.name for setting in fields(settings_class)])


def report_errors(command: str, run: Callable[..., int], *arguments: Any) -> int:
    """`run(*arguments)`; a mistake that a person can mend, or a file that cannot be opened, becomes exit code 2."""
    try:
        return run(*arguments)
    except (UserError, OSError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted", file=sys.stderr)
        return 130


COMMANDS = {
    "prepare": ("diptych.data_prep.prepare", "raw rows -> a prepared dataset"),
    "train": ("diptych.finetune.train", "a prepared dataset and a checkpoint or a new model -> a run folder"),
    "evaluate": ("diptych.finetune.evaluation", "a checkpoint and a prepared split -> loss and metrics"),
    "generate": ("diptych.finetune.generate", "a prompt, a session or a JSONL file -> text"),
    "doctor": ("diptych.finetune.doctor", "a checkpoint -> whether its training is right, and what to do if not"),
    "tokenizer": ("diptych.data_prep.tokenizer_command", "texts -> a tokenizer, a report on one, or an extended one"),
}

if __name__ == "__main__":
    raise SystemExit(main())
