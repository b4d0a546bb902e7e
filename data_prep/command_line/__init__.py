"""How every command is called: its arguments, the names that people bring, its mistakes and exit codes."""
