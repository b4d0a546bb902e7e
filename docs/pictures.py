"""The pictures of README and of how-it-works.md, taken anew from the demo's model after `make demo`.

    python docs/pictures.py runs/demo/model/final

Needs Chromium (chromium, chromium-browser or google-chrome on PATH) and the extra `test`.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from diptych.finetune.inspection import main as inspect

HERE = Path(__file__).parent
SENTENCE = "My dream is to become a famous singer."
TARGET = "내 꿈은 유명한 가수가 되는 것이야."
STYLE = ".strip { display: none; } section { padding: 24px 28px; margin: 0; }"


def main(model: str) -> None:
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file = Path(folder) / "inspect.html"
        inspect(
            [model, "--instruction", "Translate English to Korean:", "--input", SENTENCE]
            + ["--target", TARGET, "--out", str(file)]
        )
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1120, "height": 800})
        page.goto(file.as_uri())
        page.click("#step-chips button:nth-child(4)")
        for section in ("cross", "next", "lens"):
            picture(page, section)
        browser.close()


def picture(page: Page, section: str) -> None:
    page.locator(f"#{section}").screenshot(path=HERE / f"inspect-{section}.png", style=STYLE)


if __name__ == "__main__":
    main(sys.argv[1])
