"""`python -m cmrm`: the same as the command `cmrm`."""

from cmrm.cli.main import run

if __name__ == "__main__":
    run()
