"""The command `diptych inspect`."""
