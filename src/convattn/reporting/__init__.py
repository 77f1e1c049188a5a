"""The report of a comparison: one HTML file, to read, print or send, without a network.

    convattn.reporting.write(results, folder)

It draws what others computed; the numbers that it shows are those of `results.json`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["write"]

NAME = "report.html"


def write(results: Mapping[str, Any], folder: Path) -> Path:
    """Write `folder/report.html` for the results of a comparison and return its path.

    The file appears whole or not at all, and the same results give the same bytes.

    Raises:
        ComparisonError: the results have another schema than this version draws.
        MissingExtra: Jinja2 or Matplotlib is not installed.
    """
    from convattn.reporting.page import render

    # a path may hold bytes that are no text; they show as \udcff
    content = render(results).encode("utf-8", errors="backslashreplace")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{NAME}.{os.getpid()}.tmp"
    try:
        unfinished.write_bytes(content)
        unfinished.replace(folder / NAME)
    finally:
        unfinished.unlink(missing_ok=True)
    return folder / NAME
