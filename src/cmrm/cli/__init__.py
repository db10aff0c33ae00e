"""The command line: `main.py` registers, one file per command."""
