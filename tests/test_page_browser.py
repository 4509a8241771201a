"""The page in a real browser: 400 and 1280 pixels wide, light and dark, measured as it is laid out.

A frame of the width in question holds the page, since a browser's window is not made as narrow as a
phone's. Skipped, saying so, where no Chromium is installed.
"""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import stores

from fp4tune.cache import publish
from fp4tune.cache.ledger import Ledger
from fp4tune.report.page import node

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FRAME = """<!doctype html><meta charset="utf-8"><style>body{margin:0}iframe{border:0}</style>
<iframe id="page" width="%d" height="900" srcdoc="%s"></iframe><pre id="said"></pre>
<script>
document.getElementById("page").onload = () => {
  const view = document.getElementById("page").contentWindow, page = view.document;
  const wide = page.documentElement.clientWidth;
  const outside = [...page.body.querySelectorAll("*")].filter((each) => {
    if (each.closest(".scroll,.vh,.skip,svg")) return false;
    const box = each.getBoundingClientRect();
    return box.width > 0 && box.right > wide + 1;
  });
  const boxes = [...page.querySelectorAll(".scroll")].filter((box) => box.clientWidth > 0);
  const cut = boxes.filter((box) => box.scrollWidth > box.clientWidth + 1);
  const hinted = cut.filter((box) => {
    const hint = box.querySelector(".hint");
    return hint && hint.getBoundingClientRect().width > 0;
  });
  const status = page.getElementById("status").getBoundingClientRect();
  const chart = page.querySelector("figure.chart svg").getBoundingClientRect();
  const room = page.querySelector("figure.chart").parentElement.clientWidth;
  const style = view.getComputedStyle(page.body);
  document.getElementById("said").textContent = JSON.stringify({
    wide, scrolls: page.documentElement.scrollWidth,
    outside: outside.map((each) => each.tagName + "." + each.className),
    cut: cut.length, hinted: hinted.length, top: status.top, bottom: status.bottom,
    chart: chart.width, room, paper: style.backgroundColor, ink: style.color,
  });
};
</script>"""


@pytest.fixture(scope="module")
def browser() -> str:
    named = os.environ.get("FP4TUNE_TEST_BROWSER")
    found = next((path for name in (named, *BROWSERS) if name and (path := shutil.which(name))), "")
    if not found:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    return found


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> str:
    """A node's page with many layers, long names, an unsafe backend and a quarantine's worth."""
    place = tmp_path_factory.mktemp("state")
    with Ledger.open(place) as ledger:
        run = stores.start(ledger)
        ledger.finish_run(run)
    choices, candidates = stores.rows_for("first", layers=9, gpu="NVIDIA H200")
    bad = [
        replace(c, backend="a-backend-with-a-long-name", verdict="unsafe", rank=None)
        for c in candidates
    ]
    publish.publish(place, choices, [*candidates, *bad], [stores.ENVIRONMENT], {"run": "first"})
    return node.document(place)


def measured(browser: str, document: str, width: int, dark: bool, folder: Path) -> dict:
    page = folder / "frame.html"
    page.write_text(FRAME % (width, html.escape(document)), encoding="utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 800)},1000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    text = done.stdout.partition('<pre id="said">')[2].partition("</pre>")[0]
    assert text, done.stderr[-2000:]
    return json.loads(html.unescape(text))


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_and_starts_with_the_status(browser, document, width, dark, tmp_path):
    seen = measured(browser, document, width, dark, tmp_path)
    assert seen["scrolls"] <= seen["wide"] and seen["outside"] == []
    assert seen["hinted"] == seen["cut"] or width > 768
    assert seen["top"] >= 0 and seen["bottom"] <= 900
    assert seen["chart"] >= 0.9 * seen["room"]
    paper = [int(part) for part in seen["paper"][4:-1].split(",")]
    assert (sum(paper) < 3 * 128) == dark
