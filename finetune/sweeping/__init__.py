"""The command `diptych sweep`."""
