"""How fast JPEG files are decoded: by imagecodecs, which convattn takes, by torchvision and by Pillow, in turn.

python benchmarks/decoding.py [--images FOLDER] [--repeats 15] [--markdown FILE]

One thread, from bytes in memory to an array. Without a folder the images are smooth noise at quality 90. Every decoder
has to give the pixels that Pillow gives.
"""

import argparse
import io
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

import imagecodecs
import numpy as np
import PIL
import torch
import torchvision
from PIL import Image

from convattn import cost

SIDES, COUNT = (32, 128, 512), 64


def main() -> None:
    """Print the table, and write it to a file as well if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of JPEG files, searched through")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = [
        f"{options.repeats} rounds; times of Pillow's, medians with quartiles. Pillow {PIL.__version__}, torchvision "
        f"{torchvision.__version__}, imagecodecs {imagecodecs.__version__}; {date.today()}.\n",
        "| images | Pillow, images/s | torchvision | imagecodecs |",
        "|---|---|---|---|",
    ]
    sets = {f"{side} px": noise(side) for side in SIDES}
    if options.images is not None:
        paths = sorted(options.images.rglob("*.jpg"))[:: max(1, len(list(options.images.rglob("*.jpg"))) // COUNT)]
        sets = {options.images.name: [path.read_bytes() for path in paths[:COUNT]]}
    for name, files in sets.items():
        lines.append(row(name, files, options.repeats))
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")


def row(name: str, files: list[bytes], repeats: int) -> str:
    """A line of the table."""
    decoders: dict[str, Callable[[bytes], np.ndarray]] = {
        "Pillow": by_pillow,
        "torchvision": by_torchvision,
        "imagecodecs": imagecodecs.jpeg8_decode,
    }
    for decoder in decoders.values():
        if not all(np.array_equal(decoder(file), by_pillow(file)) for file in files):
            raise SystemExit(f"{name}: other pixels")
    steps = {key: (lambda decoder=decoder: [decoder(file) for file in files]) for key, decoder in decoders.items()}
    times, ratios = cost.interleaved(steps, repeats=repeats, seconds=600)
    rate = 1000 * len(files) / times["Pillow"].median
    others = (ratios[key] for key in ("torchvision", "imagecodecs"))
    cells = [f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" for ratio in others]
    return f"| {name} | {rate:,.0f} | {' | '.join(cells)} |"


def by_pillow(content: bytes) -> np.ndarray:
    """The pixels (H, W, 3) as Pillow gives them."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def by_torchvision(content: bytes) -> np.ndarray:
    """The same by torchvision."""
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    x = torchvision.io.decode_jpeg(data, mode=torchvision.io.ImageReadMode.RGB)
    return x.permute(1, 2, 0).contiguous().numpy()


def noise(side: int) -> list[bytes]:
    """JPEG files of smooth noise."""
    random = np.random.default_rng(side)
    files = []
    for _ in range(COUNT):
        file = io.BytesIO()
        small = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


if __name__ == "__main__":
    main()
