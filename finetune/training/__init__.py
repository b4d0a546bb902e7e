"""The training loop, what is set up before it and saved after it."""
