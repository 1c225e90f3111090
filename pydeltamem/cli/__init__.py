"""The command `deltamem`: one module a subcommand (main.py lists them), and the option types that they share."""
