"""Tables as plain text."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], marks: str) -> list[str]:
    """Rows of cells as lines whose columns stand under one another; a mark for each column: `<` left, `>` right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{mark}{width}}" for cell, mark, width in zip(row, marks, widths, strict=True)).rstrip()
        for row in rows
    ]
