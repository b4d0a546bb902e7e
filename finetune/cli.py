"""The command `diptych`, and the two things that its subcommands share: reading settings, and reporting user errors.

    diptych prepare …     diptych train …     diptych evaluate …     diptych generate …     diptych doctor …

Each subcommand is the `main(argv)` of one file and returns its exit code (exits.py): 0 done, 2 a user's error, told in
one message without a traceback. Nothing heavy is imported before a subcommand is known, so that
`diptych --help` answers in a tenth of a second.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from diptych.data_prep.arguments import choose_from, parse
from diptych.data_prep.records import UserError

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
    except BrokenPipeError:  # `| head` has read enough; nothing may be flushed into the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _list_commands() -> str:
    return "\n".join(f"  {name:10}{summary}" for name, (_, summary) in COMMANDS.items())


def parse_settings(
    settings_class: type[Settings], command: str, argv: Sequence[str] | None, usage: str | None = None
) -> Settings:
    """The command line as a frozen dataclass (arguments.py). What cannot be meant ends the process with code 2."""
    try:
        return parse(settings_class, command, sys.argv[1:] if argv is None else argv, usage)
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def report_errors(command: str, run: Callable[..., int], *arguments: Any) -> int:
    """`run(*arguments)`; what a person can mend becomes one message and the exit code of exits.py."""
    try:
        return run(*arguments)
    except (UserError, OSError) as error:
        from diptych.finetune.exits import exit_code_of

        is_of_a_file = isinstance(error, OSError) and error.filename is not None
        told = f"{error.filename}: {error.strerror}" if is_of_a_file else str(error)
        print(f"{command}: {told}", file=sys.stderr)
        return exit_code_of(error)
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted", file=sys.stderr)
        return 130


COMMANDS = {
    "prepare": ("diptych.data_prep.prepare", "raw rows -> a prepared dataset"),
    "denoise": (
        "diptych.data_prep.denoising",
        "raw text -> pairs that `prepare` packs: prefixes, spans, UL2's mixture",
    ),
    "train": ("diptych.finetune.train", "a prepared dataset and a checkpoint or a new model -> a run folder"),
    "evaluate": ("diptych.finetune.evaluation", "a checkpoint and a prepared split -> loss and metrics"),
    "compare": ("diptych.finetune.compare", "two runs or two reports -> what differs, whether by chance, and curves"),
    "generate": ("diptych.finetune.generate", "a prompt, a session or a JSONL file -> text"),
    "inspect": ("diptych.finetune.inspection", "a checkpoint and an input -> a page that shows each step inside"),
    "demo": ("diptych.finetune.demo", "a checkpoint, or two side by side, on a page to try"),
    "serve": ("diptych.finetune.serve", "a checkpoint behind OpenAI's HTTP interface"),
    "doctor": ("diptych.finetune.doctor", "a checkpoint -> whether its training is right, and what to do if not"),
    "publish": ("diptych.finetune.publish", "a run folder -> its final model on the Hub, with a card"),
    "pair": ("diptych.finetune.pair", "a decoder-only LLM, or two -> an encoder-decoder"),
    "merge": ("diptych.finetune.merge", "an adapter -> a plain checkpoint, with the adapter in its weights"),
    "export": ("diptych.finetune.export", "a checkpoint -> a folder for a faster engine, proven to write the same"),
    "tokenizer": ("diptych.data_prep.tokenizer_command", "texts -> a tokenizer, a report on one, or an extended one"),
}

if __name__ == "__main__":
    raise SystemExit(main())
