"""`python -m doratune.cli` is `doratune`."""

from .main import entry

entry()
