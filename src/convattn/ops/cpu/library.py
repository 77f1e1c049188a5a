"""The compiled kernels, and the threads that they run in."""

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType
from typing import Any

import torch

MODULE = "convattn.ops.cpu._kernels"
# what the names of those on maps end with; the others are on small maps, in float32
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# below so many elements a second thread costs more than it saves
FEW = 1 << 15
# and up to so many multiply-adds an MLP takes less time than matrix products of PyTorch: batch 32 of 2048 channels
FEW_PRODUCTS = 1 << 24


class Library:
    """The functions of the library by name and dtype."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.path = Path(module.__file__)
        self.functions: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
        for name, function in vars(module).items():
            if isinstance(function, BuiltinFunctionType):
                stem, _, suffix = name.rpartition("_")
                known = (stem, DTYPES[suffix]) if suffix in DTYPES else (name, torch.float32)
                self.functions[known] = function
        self.has_threads = self._share_threads()

    @property
    def instructions(self) -> str:
        """Which of its paths runs here."""
        return "AVX2" if self.module.path(-1) else "portable"

    def use_avx2(self, wanted: bool) -> str:
        """Take one of both paths, if the processor has it, and return the one that is taken: for tests."""
        self.module.path(int(wanted))
        return self.instructions

    def _share_threads(self) -> bool:
        """Hand over the functions that start PyTorch's own threads: a second pool would fight with it."""
        found = openmp()
        if found is None:
            return False
        names = ("GOMP_parallel", "omp_get_thread_num")
        self.module.threads(*(ctypes.cast(found[name], ctypes.c_void_p).value for name in names))
        # a child process has none of the threads that its parent started, and would wait for them
        os.register_at_fork(after_in_child=lambda: self.module.threads(None, None))
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
    if importlib.util.find_spec(MODULE) is None:
        return None, "it was not compiled when convattn was installed, which takes a C++ compiler and Python's headers"
    try:
        return Library(importlib.import_module(MODULE)), None
    except (ImportError, AttributeError) as error:
        return None, f"{MODULE} cannot be loaded ({error})"


# at import, so that compilers find plain values
LOADED, WHY_NOT = _found()
# those of LOADED
FUNCTIONS: dict[tuple[str, torch.dtype], Callable[..., None]] = {} if LOADED is None else LOADED.functions
