"""`python -m doratune`, and so `torchrun … -m doratune train`, is `doratune`."""

from .cli.main import entry

if __name__ == "__main__":
    entry()
