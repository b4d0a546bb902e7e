"""Training, evaluation and generation of encoder-decoders, and the command `diptych`."""
