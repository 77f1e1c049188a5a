"""The compiled kernels, through ctypes."""

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
# what an MLP and a window are given as
MLP, WINDOW = "lli****", "lllliif*****"
# by name what a function takes behind the shape of a map: `*` is a pointer and `i` a number
ON_MAPS = {
    "pool": "***",
    "statistics": "*****",
    "summarise": "*****",
    "apply": "******",
    "grad_gates": "******i***",
    "grad_summary": "*" * 11,
    "grad_input": "*" * 15,
    "gated": "****i" + MLP + "*****" + WINDOW + "***",
    "grad_gated": "*****" + MLP + "*********" + WINDOW + "******",
}
# and what those on small maps take, `l` being a long number, `f` one in float32 and `d` one in float64
ON_SMALL = {
    "normalise": "llli" + "d" + "*" * 11,
    "follow": "lld" + "****",
    "window": "l" + WINDOW + "****",
    "grad_window": "l" + WINDOW + "*******",
    "mlp": "ll" + MLP + "*****",
    "grad_mlp": "ll" + MLP + "**********",
}
TYPES: dict[str, Any] = {
    "*": ctypes.c_void_p,
    "i": ctypes.c_int,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
# below so many elements a second thread costs more than it saves
FEW = 1 << 15
# and up to so many multiply-adds an MLP takes less time than matrix products of PyTorch: batch 32 of 2048 channels
FEW_PRODUCTS = 1 << 24


class Library:
    """The functions of the library by name and dtype."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loaded = ctypes.CDLL(str(path))
        self.functions: dict[tuple[str, torch.dtype], Any] = {}
        for name, taken in ON_MAPS.items():
            for dtype, suffix in SUFFIXES.items():
                self.functions[name, dtype] = self._function(f"{name}_{suffix}", "lllii" + taken)
        for name, taken in ON_SMALL.items():
            self.functions[name, torch.float32] = self._function(name, taken)
        self.loaded.convattn_threads.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.has_threads = self._share_threads()

    def _function(self, name: str, taken: str) -> Any:
        function = self.loaded[f"convattn_{name}"]
        function.argtypes = [TYPES[one] for one in taken]
        function.restype = None
        return function

    @property
    def instructions(self) -> str:
        """Which of its paths runs here."""
        return "AVX2" if self.loaded.convattn_path(-1) else "portable"

    def use_avx2(self, wanted: bool) -> str:
        """Take one of both paths, if the processor has it, and return the one that is taken: for tests."""
        self.loaded.convattn_path(int(wanted))
        return self.instructions

    def _share_threads(self) -> bool:
        """Hand over the functions that start PyTorch's own threads: a second pool would fight with it."""
        found = openmp()
        if found is None:
            return False
        parallel, number = (
            ctypes.cast(found[name], ctypes.c_void_p) for name in ("GOMP_parallel", "omp_get_thread_num")
        )
        self.loaded.convattn_threads(parallel, number)
        # a child process has none of the threads that its parent started, and would wait for them
        os.register_at_fork(after_in_child=lambda: self.loaded.convattn_threads(None, None))
        return True


def openmp() -> ctypes.CDLL | None:
    """The OpenMP library that PyTorch brings and has loaded, if it has the functions that GCC calls."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        try:
            found = ctypes.CDLL(str(path))
            found.GOMP_parallel, found.omp_get_thread_num  # noqa: B018
        except (OSError, AttributeError):
            continue
        return found
    return None


def _found() -> tuple[Library | None, str | None]:
    """The library, or why there is none."""
    paths = sorted(path for path in FOLDER.glob("_kernels*") if path.suffix in (".so", ".pyd", ".dylib"))
    if not paths:
        return None, "it was not compiled when convattn was installed, which takes a C++ compiler"
    try:
        return Library(paths[-1]), None
    except (OSError, AttributeError) as error:
        return None, f"{paths[-1]} cannot be loaded ({error})"


# at import, so that compilers find plain values
LOADED, WHY_NOT = _found()


def loaded() -> Library:
    """The library, where `why_not` says nothing."""
    assert LOADED is not None, WHY_NOT  # noqa: S101
    return LOADED


def why_not() -> str | None:
    """Why there is no library; None where there is one."""
    return WHY_NOT


def threads_for(elements: int) -> int:
    """As many threads as PyTorch would take, and a single one for little work."""
    return 1 if elements < FEW else torch.get_num_threads()
