"""`torchrun -m diptych.finetune.evaluating`: `diptych evaluate` under the name that launchers call."""

from diptych.finetune.commands import cli

if __name__ == "__main__":
    raise SystemExit(cli.run("evaluate", None))
