"""The command `diptych export`."""
