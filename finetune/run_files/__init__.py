"""What a run writes: folders that are whole or absent, checkpoints, the log, the plot."""
