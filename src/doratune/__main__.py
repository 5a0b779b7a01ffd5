"""`python -m doratune COMMAND …`, also under torchrun."""

from .cli.main import entry

if __name__ == "__main__":
    entry()
