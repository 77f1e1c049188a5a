"""Which backend serves what on this machine, why another does not, and which settings matter."""

import os

import torch

from convattn.ops import backends, cpu
from convattn.ops.cpu import library

# what users pass most, and what is served by plain PyTorch alone
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# read by PyTorch when it starts
PAGES = "THP_MEM_ALLOC_ENABLE"
THREADS = "OMP_NUM_THREADS"


def status() -> list[tuple[str, str]]:
    """Lines of a name and what there is to say of it."""
    return [
        ("PyTorch", torch.__version__),
        ("asked for", backends.asked() or f"nothing: each map gets the fastest that serves it ({backends.VARIABLE})"),
        ("reference", "plain PyTorch: serves everything, and what torch.compile and torch.export see"),
        ("cpu", _cpu()),
        *((f"  {str(dtype).removeprefix('torch.')}", _served(dtype)) for dtype in DTYPES),
        ("threads", _threads()),
        ("large pages", _pages()),
        ("CUDA", _cuda()),
    ]


def _cpu() -> str:
    found = library.LOADED
    if found is None:
        return f"fused operators are not used: {library.why_not()}"
    return f"fused operators, {found.instructions}: {found.path}"


def _served(dtype: torch.dtype) -> str:
    # nothing of it is ever read
    why = cpu.why_not_for(torch.empty((1, 1, 1, 1), dtype=dtype))
    return "served by cpu" if why is None else f"served by reference, since cpu is not: {why}"


def _threads() -> str:
    found = library.LOADED
    shared = (
        "" if found is None or found.has_threads else "; the fused operators use one, since PyTorch's were not found"
    )
    given = os.environ.get(THREADS)
    return f"{torch.get_num_threads()} ({THREADS}{f'={given}' if given else ' is not set'}){shared}"


def _pages() -> str:
    if os.environ.get(PAGES) == "1":
        return (
            f"on ({PAGES}=1, which the command line sets itself, and which scripts of your own need before they start)"
        )
    return (
        f"off: on Linux, {PAGES}=1 before Python starts makes all that works on maps above 32 MB faster, since fresh "
        f"pages cost more than the work"
    )


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "not available"
    return (
        f"{torch.cuda.get_device_name()}: served by reference; {backends.VARIABLE}=cuda asks for fused operators in "
        f"Triton, which were tested in its interpreter and not measured on a GPU"
    )
