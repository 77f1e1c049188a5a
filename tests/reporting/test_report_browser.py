"""The report in a real browser: no error in its console, and no sideways scrolling on a phone."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from reporting_results import results

from convattn.reporting.page import render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# a browser window has a least width, a frame in it has not
FRAME = """<!DOCTYPE html><iframe style="width: {width}px; height: 800px; border: 0" srcdoc="{page}"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {{ document.title = "width " + frame.contentDocument.documentElement.scrollWidth; }};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; the page itself is tested in test_report_page.py")
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_and_the_console_is_silent(tmp_path: Path, width: int) -> None:
    given = results(["se", "cbam(reduction=8)", "a variant with a rather long name"], classes=["x" * 60, "y"])
    given["data"]["left_out"] = [{"path": "a" * 200, "reason": "b" * 200}]
    given["command"] *= 5
    page = tmp_path / "frame.html"
    page.write_text(FRAME.format(width=width, page=html.escape(render(given))), encoding="utf-8")
    switches = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --dump-dom"
    command = [str(CHROMIUM), *switches.split(), "--enable-logging=stderr", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    measured = re.search(r"<title>width (\d+)</title>", done.stdout)
    assert measured is not None, done.stderr
    # the frame's own scroll bar takes some of its width
    assert int(measured[1]) <= width
    assert "CONSOLE" not in done.stderr
