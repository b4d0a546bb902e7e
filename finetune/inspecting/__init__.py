"""The commands `diptych inspect` and `diptych doctor`."""
