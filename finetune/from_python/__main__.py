"""`python -m diptych VERB …` is `diptych VERB …`."""


def main() -> int:
    try:
        from diptych.finetune.commands.cli import main as run  # here, so that Ctrl-C meanwhile gives no traceback

        return run()
    except KeyboardInterrupt:
        return 130  # INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
