"""The command line. Errors are one line on stderr: exit 2 for a request that cannot be met, 1 for a broken run."""

import os
import sys
import warnings
from typing import Any

from convattn import checks
from convattn.errors import ConvattnError, RunFailed

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `convattn`."""
    # read by PyTorch when it is imported: large pages make large tensors several times faster
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    warnings.showwarning = _one_line
    try:
        checks.extra("typer", "The command line")
        from convattn.cli.commands import app

        given = sys.argv[1:] if arguments is None else arguments
        code = app(args=given or ["--help"], standalone_mode=False)
    except ConvattnError as error:
        _fail(str(error), 1 if isinstance(error, RunFailed) else 2)
    except KeyboardInterrupt:
        # before the parser, which turns an interrupt into a code
        code = INTERRUPTED
    except Exception as error:
        # the parser's own errors have a message for the user; anything else is a defect and shows its trace
        said = getattr(error, "format_message", None)
        if said is None:
            raise
        _fail(f"{said().rstrip('.')}. See convattn --help.", 2)
    if code == INTERRUPTED:
        _fail("interrupted; what is done is kept, and the same command goes on from there.", INTERRUPTED)
    raise SystemExit(code or 0)


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"convattn: {' '.join(message.split())}\n")
    raise SystemExit(code)


def _one_line(message: Warning | str, *rest: Any, **more: Any) -> None:
    sys.stderr.write(f"convattn: {' '.join(str(message).split())}\n")
