"""The fused operators beside timm's modules, torchvision's, the compiler and plain PyTorch, on maps and in a ResNet-50.

Runs `convattn bench` for both modules and both settings of the allocator, each in a process of its own, and writes one
file of their tables.

python benchmarks/fused.py [--markdown benchmarks/results/fused.md] [--repeats 11]
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HEAD = """# Fused operators

Written by `python benchmarks/fused.py`. Ratios below 1 say that ours is faster; in networks they are over the network
alone. For a GPU see cuda.md.
"""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument("--repeats", type=int, default=11)
    given = parser.parse_args()
    parts = [HEAD]
    for op, against in (("cbam", "timm,compile,plain"), ("se", "timm,torchvision,compile,plain")):
        for pages in ("0", "1"):
            title = f"{op.upper()}, large pages of the allocator {'on' if pages == '1' else 'off'}"
            parts.append(
                f"## {title} (`THP_MEM_ALLOC_ENABLE={pages}`)\n\n{_measured(op, against, pages, given.repeats)}"
            )
            if given.markdown:
                given.markdown.write_text("\n".join(parts))
    sys.stdout.write("\n".join(parts))


def _measured(op: str, against: str, pages: str, repeats: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        words = ["bench", "--op", op, "--against", against, "--network", "resnet50"]
        subprocess.run(
            [sys.executable, "-m", "convattn", *words, "--repeats", str(repeats), "--out", folder],
            env=os.environ | {"THP_MEM_ALLOC_ENABLE": pages},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return (Path(folder) / "table.md").read_text()


if __name__ == "__main__":
    main()
