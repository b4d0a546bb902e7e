"""The commands `diptych export` and `diptych publish`."""
