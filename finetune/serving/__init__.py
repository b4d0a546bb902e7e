"""The commands `diptych serve` and `diptych demo`."""
