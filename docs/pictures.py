"""The pictures of README and of how-it-works.md, taken anew of the demo's model after `make demo`.

    python docs/pictures.py runs/demo/model/final

Needs Chromium (chromium, chromium-browser or google-chrome on PATH) and the extra `test`.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from diptych.finetune.commands import cli

HERE = Path(__file__).parent
INSTRUCTION = "Pronounce:"
WORD = "t w i l i g h t"  # one of the words that were held out, which it pronounces as the dictionary does
STYLE = ".strip { display: none; } section { padding: 24px 28px; margin: 0; }"


def main(model: str) -> None:
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "inspect.html"
        cli.run("inspect", [model, "--instruction", INSTRUCTION, "--input", WORD, "--out", str(file)])
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1120, "height": 800})
        page.goto(file.as_uri())
        page.click("#step-chips button:nth-child(6)")
        for section in ("cross", "next", "lens"):
            picture(page, section)
        demo_page(browser, model)
        browser.close()


def demo_page(browser: Browser, model: str) -> None:
    """Of a process of its own, which says where it listens."""
    command = [sys.executable, "-m", "diptych.finetune.commands.cli", "demo", model, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    url = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+", line)))
    page = browser.new_page(viewport={"width": 1120, "height": 620})
    page.goto(url)
    page.fill("#instruction textarea", INSTRUCTION)
    page.fill("#input textarea", WORD)
    page.click("#go")
    page.wait_for_selector("#looks-0 table")
    page.screenshot(path=HERE / "demo-page.png")
    process.terminate()
    process.wait()


def picture(page: Page, section: str) -> None:
    page.locator(f"#{section}").screenshot(path=HERE / f"inspect-{section}.png", style=STYLE)


if __name__ == "__main__":
    main(sys.argv[1])
