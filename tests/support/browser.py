"""A page in headless Chromium, where there is one."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
WIDTHS = (360, 1400)
"""Pixels: a phone's and a desktop's."""

# The page has no script, so the one around it measures. A window of headless Chromium is at least 500 pixels
# wide; a frame is as narrow as it is asked to be.
_AROUND = """<!doctype html><title>not measured</title>
<iframe style="width:{width}px;height:2000px;border:0" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const drawn = [...page.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().height > 50);
  const apart = [...page.querySelectorAll("body *:not(.wide *)")]; // a wide table scrolls by itself
  const wide = apart.filter(e => e.getBoundingClientRect().right > {width});
  const names = wide.slice(0, 5).map(e => e.tagName + "." + e.className);
  document.title = [root.scrollWidth, drawn.length, names].join(" ");
}})</script>"""


def assert_drawn(page: Path, folder: Path, width: int, plots: int) -> None:
    """Drawn without a message on the console, no wider than the window, with so many plots of some height."""
    assert BROWSER is not None
    around = folder / f"around_{width}.html"
    around.write_text(_AROUND.format(width=width, page=html.escape(page.read_text())))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--window-size={max(width, 500) + 50},2100", f"--user-data-dir={folder}/profile"]
    done = subprocess.run(
        [*command, "--dump-dom", around.as_uri()], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    found = re.search(r"<title>(\d+) (\d+) (.*)</title>", done.stdout)
    assert found is not None, "the page was not measured"
    assert int(found[1]) <= width, f"{found[1]} pixels wide in a window of {width}: {found[3]}"
    assert int(found[2]) == plots
