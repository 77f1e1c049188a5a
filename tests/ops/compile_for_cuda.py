"""Compile every kernel in Triton for a GPU that need not be there: the interpreter lets pass what a compiler does not.

Run as a script, since a process either interprets or compiles.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convattn.ops.cuda import kernels

NAMES = ("pool", "summarise", "apply", "grad_gates", "grad_summary", "grad_input")
MAPS = ("x", "y", "dy", "dx", "shortcut")
NUMBERS = ("c", "n", "stride_c", "stride_n", "groups", "blocks_n")


def compiled(name: str, dtype: str, constants: dict[str, int]) -> int:
    """The number of bytes that a GPU would run."""
    kernel = getattr(kernels, name)
    kinds = dict.fromkeys(constants, "constexpr") | dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(MAPS, f"*{dtype}")
    signature = {one: kinds.get(one, "*fp32") for one in kernel.arg_names}
    found = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    return len(found.asm["cubin"])


for name in NAMES:
    flags = [one for one in getattr(kernels, name).arg_names if one.isupper() and not one.startswith("BLOCK")]
    alone = [{flag: flag == one for flag in flags} for one in flags]
    for constants in (dict.fromkeys(flags, False), dict.fromkeys(flags, True), *alone):
        if constants.get("GATED") and not constants.get("CHANNEL", True):
            continue
        for dtype, sides in (("fp32", (8, 128)), ("bf16", (64, 16)), ("fp16", (64, 16))):
            size = compiled(name, dtype, constants | dict(zip(("BLOCK_C", "BLOCK_N"), sides, strict=True)))
            print(name, dtype, *(flag for flag, given in constants.items() if given), size)
