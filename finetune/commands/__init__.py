"""What a process that runs a command is: the command, its settings, its exit code, its rank, its signals."""
