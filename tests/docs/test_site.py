"""The site builds without a warning; what it shows of the code is the code; every page is found from its menu."""

import re
import subprocess
import sys

import pytest
import yaml
from pages import ROOT

import doratune

pytest.importorskip("material")
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    words = ["build", "--strict", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(folder)]
    run = subprocess.run([sys.executable, "-m", "mkdocs", *words], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


def plain(html: str) -> str:
    import html as entities

    return entities.unescape(re.sub(r"<[^>]*>", "", html))


def menu(entries) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    return [page for entry in (entries.values() if isinstance(entries, dict) else entries) for page in menu(entry)]


def test_every_page_is_in_the_menu_but_the_log(site):
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = menu(yaml.safe_load(text)["nav"])
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name != "log.md")
    for page in named:
        assert (site / page.replace(".md", ".html")).is_file()


def test_the_api_has_every_public_name_with_its_settings(site):
    text = plain((site / "api.html").read_text(encoding="utf-8"))
    assert [name for name in doratune.__all__ if f"doratune.{name}" not in text] == []
    for setting in doratune.AdapterConfig.__dataclass_fields__:
        assert setting in text


def test_formulas_stand_beside_the_code_as_it_is(site):
    import inspect

    from doratune.math import decomposition, dora, norm

    shown = re.sub(r"\s", "", plain((site / "formulas.html").read_text(encoding="utf-8")))
    for function in (dora.dora, decomposition.directionless, norm.terms, norm.full_gradient_output):
        assert re.sub(r"\s", "", inspect.getsource(function).rpartition('"""')[2]) in shown


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"https?://[^\"]*\.(?:js|css|png|woff2?)\"", text) == []


@pytest.mark.parametrize("wrong", ["[x](no_such_page.md)", "::: doratune.no_such_name", "[x](index.md#no-such-heading)"])
def test_a_page_that_is_wrong_stops_the_build(wrong, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n{wrong}\n")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("not_in_nav")[0].replace("[src]", f"[{ROOT / 'src'}]")
    (tmp_path / "mkdocs.yml").write_text(settings)
    run = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict"], cwd=tmp_path, capture_output=True, timeout=600)
    assert run.returncode != 0
