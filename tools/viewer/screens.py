"""The pictures of docs/inspect.md: a build's page in a headless Chromium, as a person comes to see it.

python -m fp8c.tools.viewer.screens BUILD docs/images/inspect
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from fp8c.build import read_build
from fp8c.tools.viewer.chromium import Browser, chromium
from fp8c.tools.viewer.page import page
from fp8c.tools.viewer.page_data import page_data

#: The layer the pictures look into, and what they show of it.
GEMM = "scaled_mm"


def take(build: Path, out: Path) -> list[Path]:
    """Write the pictures; returns their paths."""
    data = page_data(read_build(build))
    folds = [data["paths"][run[0]] for run in data["folds"]]
    out.mkdir(parents=True, exist_ok=True)
    found: list[Path] = []
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        file = Path(folder) / "page.html"
        file.write_bytes(page(data))

        def picture(name: str) -> None:
            browser.evaluate("document.fonts.ready")
            found.append(out / f"{name}.webp")
            browser.screenshot(found[-1])

        browser.open(file.as_uri())
        picture("overview")
        layer = folds[-1]
        browser.open(f"{file.as_uri()}#module={layer}.self_attn.q_b_proj")
        open_box(browser, f"{layer}.self_attn.q_b_proj")
        browser.click(f'#forward [data-id="module:{layer}.self_attn.q_b_proj"] .box.op[data-node^={GEMM}] .head')
        picture("gemm")
        browser.dark(True)
        picture("gemm-dark")
        browser.dark(False)
        browser.open(file.as_uri())
        browser.press("/")
        browser.type("moe quantize e4m3")
        picture("search")
        for tab in ("saved", "budget"):
            browser.press("Escape")
            browser.click(f"[data-tab={tab}]")
            picture(tab)
    return found


def open_box(browser: Browser, path: str) -> None:
    browser.click(f'#forward [data-id="module:{path}"] .head')


if __name__ == "__main__":
    for made in take(Path(sys.argv[1]), Path(sys.argv[2])):
        print(f"{made}: {made.stat().st_size // 1000} kB")
