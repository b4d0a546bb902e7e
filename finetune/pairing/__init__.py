"""The command `diptych pair`."""
