"""The report of a comparison: one HTML file, to read, print or send, without a network.

    convattn.reporting.write(results, folder)

It draws what others computed; the numbers that it shows are those of `results.json`. The same numbers lie beside it as
a CSV table and as Markdown.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convattn import files
from convattn.checks import reason
from convattn.data.listing import PLAN, PREPARING
from convattn.errors import ComparisonError, ConvattnError, DamagedFile

__all__ = ["redraw", "write"]

NAME, CSV, MARKDOWN = "report.html", "results.csv", "results.md"
RESULTS = "results.json"
# what a comparison writes first
BEGUN = (PLAN, PREPARING)


def write(results: Mapping[str, Any], folder: Path) -> Path:
    """Write `report.html`, `results.csv` and `results.md` for the results of a comparison; return the report's path.

    Each file appears whole or not at all, and the same results give the same bytes.

    Raises:
        ComparisonError: the results have another schema than this version draws.
        MissingExtra: Jinja2 or Matplotlib is not installed.
    """
    from convattn.reporting import rows
    from convattn.reporting.page import render

    try:
        contents = {NAME: render(results), CSV: rows.as_csv(results), MARKDOWN: rows.as_markdown(results)}
    except ConvattnError:
        raise
    # whatever comes of results that were written by hand, or by another version
    except Exception as error:
        raise ComparisonError(
            f"report: the results are of another form than docs/results.md describes ({reason(error)}): give the "
            f"command that made them once more."
        ) from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        # a path may hold bytes that are no text; they show as \udcff
        files.write(folder / name, content.encode("utf-8", errors="backslashreplace"))
    return folder / NAME


def redraw(folder: str | Path) -> Path:
    """Write the report of a folder anew, from its `results.json` alone, and return the report's path.

    Raises:
        ComparisonError: there are no results in the folder, or none that this version draws.
        MissingExtra: Jinja2 or Matplotlib is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ComparisonError(f"{folder} {what}: give the folder of a comparison.")
    path = folder / RESULTS
    if not path.exists():
        if any((folder / name).exists() for name in BEGUN):
            raise ComparisonError(f"{folder} is not done yet: give the command that began it once more.")
        raise ComparisonError(f"{folder} has no {RESULTS}: give the folder of a comparison.")
    try:
        results = files.read_json(path, from_anywhere=True)
    except (DamagedFile, OSError) as error:
        raise ComparisonError(f"{reason(error)} Give the command that made it once more.") from error
    try:
        return write(results or {}, folder)
    except OSError as error:
        raise files.explained(error, folder) from error
