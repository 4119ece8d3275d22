"""Takes the pictures of the page for the manual.

    python -m bench.screenshots

Needs chromium. The inputs are the page's own samples (see NOTICE).
"""

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, ViewportSize, sync_playwright

from bench.serving import serving
from bench.table import RESULTS

# WebGL in software, because pictures must not depend on a graphics card.
ARGUMENTS = ("--no-sandbox", "--headless=new", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")


def main() -> None:
    """Writes results/page.png and results/page_volume.png."""
    with serving(Path("bundles")) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(ARGUMENTS))
        for name, sample, level, dark in (
            ("page", "Cells", "L2", False),
            ("page_volume", "Hippocampus", "accurate", True),
        ):
            size = ViewportSize(width=1400, height=820)
            context = browser.new_context(viewport=size, color_scheme="dark" if dark else "light")
            page = context.new_page()
            page.goto(str(server.client.base_url))
            page.get_by_role("button", name=sample).click()
            # All levels, so that every tick of the slider has its time and agreement.
            page.get_by_role("button", name="Compare all levels").click()
            page.locator("#compare figcaption .bar").nth(8).wait_for()
            page.get_by_role("button", name=f"show {level}").click()
            page.locator("#compare").wait_for(state="hidden")
            page.wait_for_timeout(1000)
            save(page, name)
            context.close()
        browser.close()


def save(page: Page, name: str) -> None:
    """Saves a screenshot as an optimised PNG."""
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(RESULTS / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
