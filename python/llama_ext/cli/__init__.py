"""The command `llama-ext`: one module a subcommand, each of which imports what computes only when it is run."""
