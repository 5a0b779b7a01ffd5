"""The site in a real browser: pages open without an error, the code stands open beside the formulas, search finds a setting."""

import contextlib
import functools
import http.server
import subprocess
import sys
import threading

import browser
import pytest
from pages import ROOT

pytest.importorskip("material")
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    if (lacks := browser.missing()) and not browser.required():
        pytest.skip(f"this machine has not {lacks}")
    folder = tmp_path_factory.mktemp("site")
    words = ["build", "--strict", "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "mkdocs", *words], check=True, capture_output=True, timeout=600)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Pages, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class Pages(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, without a line for each request."""

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def opened(address: str):
    with browser.launched() as chromium:
        page = chromium.new_page(viewport={"width": 1280, "height": 1000})
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfailed", lambda request: errors.append(request.url))
        page.on("request", lambda request: errors.append(request.url) if "127.0.0.1" not in request.url else None)
        page.goto(address)
        page.wait_for_load_state("load")
        yield page
        assert errors == []


def test_formulas_stand_beside_open_code(address):
    with opened(f"{address}/formulas.html") as page:
        assert page.locator("details.mkdocstrings-source").count() >= 5
        assert page.locator("details.mkdocstrings-source:not([open])").count() == 0
        assert page.get_by_text("torch.linalg.vector_norm(V_OI").first.is_visible()
    with opened(f"{address}/api.html") as page:
        assert page.locator("details.mkdocstrings-source[open]").count() == 0


@pytest.mark.parametrize("name", ["index", "features", "troubleshooting", "api"])
def test_no_page_is_wider_than_the_window(name, address):
    with opened(f"{address}/{name}.html") as page:
        for width in (1280, 400):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_search_finds_a_setting(address):
    with opened(f"{address}/index.html") as page:
        page.locator("input.md-search__input").fill("magnitude_from")
        page.wait_for_selector(".md-search-result__item", timeout=20_000)
        assert "magnitude_from" in page.locator(".md-search-result__list").inner_text()
