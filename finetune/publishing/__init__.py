"""The command `diptych publish`."""
