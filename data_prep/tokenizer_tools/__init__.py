"""The command `diptych tokenizer`."""
