"""Which backend serves what on this machine, why another does not, and which settings matter."""

import os

import torch

from convattn.ops import backends, cpu, cuda
from convattn.ops.cpu import library

# what users pass most, and what is served by plain PyTorch alone
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# read by PyTorch when it starts
PAGES = "THP_MEM_ALLOC_ENABLE"
THREADS = "OMP_NUM_THREADS"
WAITING = "OMP_WAIT_POLICY"


def status() -> list[tuple[str, str]]:
    """Lines of a name and what there is to say of it."""
    return [
        ("PyTorch", torch.__version__),
        ("asked for", backends.asked() or f"nothing: each map gets the fastest that serves it ({backends.VARIABLE})"),
        ("reference", "plain PyTorch: serves everything, and is what torch.export sees"),
        ("cpu", _cpu()),
        *((f"  {str(dtype).removeprefix('torch.')}", _served(dtype)) for dtype in DTYPES),
        ("  batch norms", _norms()),
        ("  torch.compile", _compiled()),
        ("threads", _threads()),
        ("large pages", _pages()),
        ("CUDA", _cuda()),
    ]


def _cpu() -> str:
    found = library.LOADED
    if found is None:
        return f"fused operators are not used: {library.WHY_NOT}"
    return f"fused operators, {found.instructions}: {found.path}"


def _served(dtype: torch.dtype) -> str:
    # nothing of it is ever read
    why = cpu.why_not_for(torch.empty((1, 1, 1, 1), dtype=dtype))
    return "served by cpu" if why is None else f"served by reference, since cpu is not: {why}"


def _norms() -> str:
    if library.LOADED is None:
        return "run by themselves"
    return (
        "one straight before an attached gate rides along in its passes, and no map is kept but its input; not while "
        "the gate's strength is 0, so that nothing changes to the bit"
    )


def _compiled() -> str:
    if library.LOADED is None:
        return "compiles all of it itself"
    return "calls convattn::gated for gates with a spatial half on channels-first maps, and compiles the rest itself"


def _threads() -> str:
    found = library.LOADED
    shared = (
        "" if found is None or found.has_threads else "; the fused operators use one, since PyTorch's were not found"
    )
    given = os.environ.get(THREADS)
    asleep = "" if os.environ.get(WAITING, "").upper() != "PASSIVE" else f"; {WAITING}=PASSIVE slows small maps down"
    return f"{torch.get_num_threads()} ({THREADS}{f'={given}' if given else ' is not set'}){shared}{asleep}"


def _pages() -> str:
    if os.environ.get(PAGES) == "1":
        return (
            f"on ({PAGES}=1, which the command line sets itself, and which scripts of your own need before they start)"
        )
    return (
        f"off: on Linux, {PAGES}=1 before Python starts makes all that works on maps above 32 MB faster, since fresh "
        f"pages cost more than the work (the fused operators ask for large pages themselves, for what they return)"
    )


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "not available"
    why = cuda.why_not_for(torch.empty((1, 1, 1, 1), device="cuda"))
    served = "served by fused operators in Triton" if why is None else f"served by reference, since cuda is not: {why}"
    return f"{torch.cuda.get_device_name()}: {served} (measured on an H200 only: benchmarks/results/cuda.md)"
