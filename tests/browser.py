"""A headless Chromium for pages. As a script it takes a picture of one, the whole length of it:

python tests/browser.py report.html docs/report.png [light|dark] [WIDTH]
"""

import contextlib
import os
import shutil
import sys
from pathlib import Path

NAMES = ("chromium", "google-chrome", "chromium-browser")


def missing() -> str | None:
    """What a browser test lacks here; None if it can run."""
    try:
        import playwright  # noqa: F401
    except ModuleNotFoundError:
        return "the package playwright"
    return None if any(map(shutil.which, NAMES)) else f"a browser: none of {', '.join(NAMES)}"


@contextlib.contextmanager
def launched():
    """A running browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, NAMES)))
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def required() -> bool:
    """DORATUNE_REQUIRE_BROWSER=1: a machine where a missing browser is a failure."""
    return os.environ.get("DORATUNE_REQUIRE_BROWSER") == "1"


def picture(browser, page_file: Path, image: Path, theme: str = "light", width: int = 1200) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    page.goto(page_file.resolve().as_uri())
    page.wait_for_selector("#curves-chart .main-svg")
    page.screenshot(path=image, full_page=True)
    page.close()


if __name__ == "__main__":
    page_file, image, *rest = sys.argv[1:]
    with launched() as browser:
        picture(browser, Path(page_file), Path(image), *rest[:1], *map(int, rest[1:]))
