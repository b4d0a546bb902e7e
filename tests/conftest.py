"""What tests of all rooms share: processes that start at once, a real browser without a network, and a visit that
tells what a page showed and tried."""

import shutil
from types import SimpleNamespace

import pytest
from nursery import Nursery

QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")


def pytest_collection_modifyitems(items):
    """What a slow fixture is made for is slow, too. Long tests come first: as the last one, each would run alone."""
    for item in items:
        if "aftermath" in item.fixturenames:  # a day of commands, in test_trust.py
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def nursery():
    with Nursery() as started:
        yield started


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("there is no chromium, chromium-browser or google-chrome on PATH")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found[0], args=[*QUIET, "--disable-sync"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser, tmp_path):
    """visit(html) opens it as a file, with all <details> open, and tells what it showed and what it tried."""

    def open_page(html, ask="() => null", media=None, **context):
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        with browser.new_context(**context) as window:
            page = window.new_page()
            page.emulate_media(media=media)
            seen = SimpleNamespace(requests=[], dialogs=[], errors=[])
            page.on("request", lambda request: seen.requests.append(request.url))
            page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
            page.on("pageerror", lambda error: seen.errors.append(str(error)))
            page.on("console", lambda message: seen.errors.append(message.text))
            page.goto(file.as_uri(), wait_until="load")
            page.evaluate("document.querySelectorAll('details').forEach(d => d.setAttribute('open', ''))")
            page.wait_for_timeout(60)  # for what a page may do after it has loaded
            seen.requests = [url for url in seen.requests if url != file.as_uri() and not url.startswith("data:")]
            seen.text = page.evaluate("document.body.innerText")
            seen.ran = page.evaluate("window.ran === true")
            seen.too_wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            seen.answer = page.evaluate(ask)
        return seen

    return open_page
