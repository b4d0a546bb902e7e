"""`python -m diptych VERB …` is `diptych VERB …`."""

from diptych.finetune.commands.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
