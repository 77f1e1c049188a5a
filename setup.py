"""The part of the build that pyproject.toml cannot say: a library of C++, which the package does without if need be."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

# no fast-math: a NaN has to come through
GCC = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi"]

KERNELS = Extension(
    "convattn.ops.cpu._kernels",
    sources=["src/convattn/ops/cpu/kernels.cpp"],
    depends=sorted(str(path) for path in Path("src/convattn/ops/cpu").glob("*.h")),
    extra_compile_args=GCC if sys.platform != "win32" else ["/std:c++17", "/O2"],
    # installed without where there is no compiler, or one that does not take it
    optional=True,
    # one library for every version of Python
    define_macros=[("Py_LIMITED_API", "0x030A0000")],
    py_limited_api=True,
)


def wanted() -> bool:
    """Whether to compile: not where CC is set to what is no compiler, though C++ is compiled by what CXX says."""
    compiler = os.environ.get("CC")
    if not compiler:
        return True
    try:
        return subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


setup(
    ext_modules=[KERNELS] if wanted() else [],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
