"""Other engines that tests run (extra `engines`): a test without its engine is skipped, or fails on a machine that must have it."""

import importlib
import os

import pytest


def engine(*names: str):
    """The first of these modules, if all can be imported. DORATUNE_REQUIRE_ENGINES=1: a missing one is a failure."""
    try:
        modules = [importlib.import_module(name) for name in names]
    except ImportError as error:
        reason = f"{error.name or names[0]} is not installed; pip install -e '.[engines]'"
        return pytest.fail(reason) if os.environ.get("DORATUNE_REQUIRE_ENGINES") == "1" else pytest.skip(reason)
    return modules[0]
