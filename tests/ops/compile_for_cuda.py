"""Compile every kernel in Triton for a GPU that need not be there: the interpreter lets pass what a compiler does not.

Run as a script, since a process either interprets or compiles; with the word "each", also with every flag by itself.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convattn.ops.cuda import kernels

MAPS = ("x", "y", "dy", "dx", "shortcut")
NUMBERS = {
    "i32": "batch c n step stride_c stride_n stride_p stride_t shares others groups deep height width count",
    "fp32": "eps momentum",
    "*i64": "tracked",
}
OTHERS = {
    "grad_gate": {"parts": "*fp64"},
    "grad_planes": {"parts": "*fp64"},
    "grad_logits": {"strengths": "*fp64"},
    "finish": {"strengths": "*fp64"},
}
# what is a number and no yes or no
SIZES = {"STAGES": 2, "STEPS": 2, "DEEP": 1, "HIGH": 7, "WIDE": 7, "ACROSS": 8, "OF_PARTS": 256}
SIZES |= {"POOLS": 2, "FIRST": 0, "ACTIVATION": "relu", "GATE": "sigmoid"}
SIZES |= {"BLOCK": 256, "COLS": 64, "BLOCK_H": 16, "BLOCK_B": 32}
# with tiles of channels and positions for two memory formats
DTYPES = {"fp32": (16, 64), "bf16": (64, 16), "fp16": (64, 16)}
KERNELS = [name for name, one in vars(kernels).items() if isinstance(one, triton.JITFunction) and name[0] != "_"]


def compiled(name: str, dtype: str, constants: dict[str, int]) -> int:
    """The number of bytes that a GPU would run."""
    kernel = getattr(kernels, name)
    kinds = {one: kind for kind, several in NUMBERS.items() for one in several.split()}
    kinds |= dict.fromkeys(MAPS, f"*{dtype}") | OTHERS.get(name, {}) | dict.fromkeys(constants, "constexpr")
    signature = {one: kinds.get(one, "*fp32") for one in kernel.arg_names}
    found = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    return len(found.asm["cubin"])


for name in KERNELS:
    given = getattr(kernels, name).arg_names
    flags = [one for one in given if one.isupper() and one not in SIZES and not one.startswith("BLOCK")]
    alone = [{flag: flag == one for flag in flags} for one in flags] if "each" in sys.argv else []
    for number, constants in enumerate((dict.fromkeys(flags, False), dict.fromkeys(flags, True), *alone)):
        if constants.get("GATED") and not constants.get("CHANNEL", True):
            continue
        # flags by themselves in one dtype, and no other where there is no map
        for dtype in list(DTYPES) if number < 2 and set(given) & set(MAPS) else ["fp32"]:
            channels, places = DTYPES[dtype]
            known = SIZES | {"BLOCK_C": channels, "BLOCK_N": places}
            size = compiled(name, dtype, constants | {one: known[one] for one in given if one in known})
            print(name, dtype, *(flag for flag, given_ in constants.items() if given_), size)
for name, constant, value in (
    *((name, "ACTIVATION", one) for name in ("mlp_second", "grad_mlp_second") for one in ("silu", "gelu", "hardswish")),
    *((name, "GATE", "hardsigmoid") for name in ("mlp_second", "grad_logits")),
):
    known = SIZES | {"BLOCK_C": 64, constant: value}
    constants = {one: known.get(one, True) for one in getattr(kernels, name).arg_names if one.isupper()}
    print(name, value, compiled(name, "fp32", constants))
