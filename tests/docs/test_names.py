"""Files, tests and names of the package that the pages speak of are there."""

import importlib
import re

import pytest
from pages import PAGES, ROOT, text_of

PATH = re.compile(r"(?<![\w/.])((?:recipes|benchmarks|tests|docs|src)/[\w./-]+\.(?:py|yaml|json|md|png))\b(?:::(\w+))?")
NAME = re.compile(r"(?<![\w/.-])doratune((?:\.[A-Za-z_]\w*)+)")
FILES = {"json", "core", "yaml", "py", "md"}
"""Endings of file names that begin like a name of the package."""


def missing_paths(text: str) -> list[str]:
    found = []
    for path, test in PATH.findall(text):
        file = ROOT / path
        if "NAME" in path:  # a placeholder
            continue
        if not file.is_file() or (test and f"def {test}(" not in file.read_text(encoding="utf-8")):
            found.append(f"{path}::{test}" if test else path)
    return found


def missing_names(text: str) -> list[str]:
    """Names that are neither a module nor something in one."""
    return [f"doratune{dotted}" for dotted in set(NAME.findall(text)) if dotted[1:] not in FILES and not is_there(dotted)]


def is_there(dotted: str) -> bool:
    """Is `.checkpoint.base_model.load_base` a module, or an attribute of one?"""
    here, module = importlib.import_module("doratune"), "doratune"
    for part in dotted[1:].split("."):
        module += f".{part}"
        if not hasattr(here, part):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError:
                return False
        here = getattr(here, part)
    return True


PAGES_OF_NOW = [page for page in PAGES if page.name != "log.md"]


@pytest.mark.parametrize("page", PAGES_OF_NOW, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = text_of(page)
    assert missing_paths(text) == [] and missing_names(text) == []


@pytest.mark.parametrize(
    "text",
    ["`recipes/nowhere.yaml`", "tests/test_repository.py::test_no_such", "`doratune.no_such(model)`", "doratune.peft.no_such"],
)
def test_the_check_sees_what_it_should(text):
    assert missing_paths(text) or missing_names(text)
