"""The command `diptych doctor`."""
