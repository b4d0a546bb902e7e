"""The steps of `diptych prepare`, from its settings to the prepared folder."""
