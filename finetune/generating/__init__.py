"""The command `generate`: prompts and files of prompts, whole documents."""
