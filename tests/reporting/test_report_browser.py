"""The report in a real browser: a silent console, no sideways scrolling on a phone, no barrier that axe finds."""

import html
import json
import os
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


# axe-core/axe.min.js, from npm
AXE = os.environ.get("AXE_CORE")
AXE_RUN = """
document.querySelectorAll("details").forEach(one => { one.open = true; });
axe.run(document).then(found => {
  const told = document.createElement("pre");
  told.id = "axe";
  told.textContent = JSON.stringify({
    violations: found.violations.map(one => [one.id, one.help, one.nodes.map(node => node.target)]),
    passes: found.passes.length,
  });
  document.body.append(told);
});"""
SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--dump-dom",
]


def opened(page: Path, *switches: str) -> subprocess.CompletedProcess[str]:
    """The page as Chromium has it after a while, and what it says."""
    command = [
        str(CHROMIUM),
        *SWITCHES,
        "--dump-dom",
        *switches,
        f"--user-data-dir={page.parent / 'profile'}",
        page.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; the page itself is tested in test_report_page.py")
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_and_the_console_is_silent(tmp_path: Path, width: int) -> None:
    given = results(["se", "cbam(reduction=8)", "a variant with a rather long name"], classes=["x" * 60, "y"])
    given["data"]["left_out"] = [{"path": "a" * 200, "reason": "b" * 200}]
    given["command"] *= 5
    page = tmp_path / "frame.html"
    page.write_text(FRAME.format(width=width, page=html.escape(render(given))), encoding="utf-8")
    done = opened(page, "--enable-logging=stderr", "--virtual-time-budget=5000")
    measured = re.search(r"<title>width (\d+)</title>", done.stdout)
    assert measured is not None, done.stderr
    # the frame's own scroll bar takes some of its width
    assert int(measured[1]) <= width
    assert "CONSOLE" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium; contrast and structure are tested in test_report_page.py")
@pytest.mark.skipif(AXE is None, reason="needs AXE_CORE, the path of axe.min.js; contrast is tested all the same")
@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_axe_finds_no_barrier(tmp_path: Path, width: int, scheme: str) -> None:
    given = results(start="identity")
    given["data"]["left_out"] = [{"path": f"cat/{place}.jpg", "reason": "truncated"} for place in range(60)]
    script = Path(str(AXE)).read_text(encoding="utf-8").replace("</script>", "<\\/script>")
    page = tmp_path / "page.html"
    added = f"<script>{script}</script><script>{AXE_RUN}</script></body>"
    page.write_text(render(given).replace("</body>", added), encoding="utf-8")
    preferred = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    done = opened(page, f"--window-size={width},900", "--virtual-time-budget=60000", preferred)
    told = re.search(r'<pre id="axe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told is not None, done.stderr
    found = json.loads(html.unescape(told[1]))
    assert found["violations"] == []
    assert found["passes"] > 30
