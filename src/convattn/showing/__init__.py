"""The gates themselves: what each site attends to, which sites do nothing."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from convattn import files, own_code
from convattn.checks import extra
from convattn.errors import InvalidOption
from convattn.showing import canvas, figures
from convattn.showing.summary import NUMBERS, Row, Table, table
from convattn.showing.watching import Seen, watch

__all__ = ["Row", "Table", "show", "table"]


def show(
    checkpoint: Path | str,
    images: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    layer: str | None = None,
    trust: own_code.Trust = (),
    factories: Mapping[str, Callable[..., nn.Module]] | None = None,
) -> Path:
    """Run a trained network on images, and draw what its gates did; `table` says it in words.

    Files in `out`:

    - `gates.npz`: the gates as applied, each named by what it varies over: `<site>/channel` (B, C, 1, 1),
      `<site>/spatial` (B, 1, H, W), `<site>/channel and spatial` (B, C, H, W), `<site>/height` (B, 1, H, 1) and so on;
      `<site>/update`, what a module adds, in units of the root mean square of the map of each image, with the sizes
      (C, H, W) of that map as `<site>/map`; `<site>/pooled` and `<site>/head` (B, C) of a pooling head;
      `<site>/strength` (1,) where there is one; `layer/<layer>` (B, C, H, W); `paths`, `names`, `predictions`
      (B, classes) and `classes`.
    - `spatial-<name>.png` for each image: its gates that vary over positions, in the mean over channels. The name is
      the image's stem, numbered where two images share it.
    - `channel.png`: the gates that vary over channels, in the mean over positions. `pool.png`: what a pooling head
      changes.
    - `update-<name>.png` and `update.png`: the same of what is added; over an image it is the root mean square over
      channels.
    - `layer-<layer>-<name>.png` for each image: its feature maps.

    Nothing is written before everything has been checked. In an existing folder, files of these names are replaced and
    all others stay, those of an earlier call with other images too.

    Args:
        checkpoint: a file that `convattn compare` or `convattn.train.checkpoint.save` wrote.
        images: files of images, or one file.
        out: the folder to write to, made where there is none.
        layer: name of a layer as in `named_modules()`, whose feature maps are drawn as well.
        trust: code of the form `FILE.py:NAME` that may be run if the checkpoint names it; no other is.
        factories: classes or factories of the user's modules, by the names that they have in the checkpoint; those
            that `convattn.register` has entered need not be given.

    Returns:
        The folder.

    Raises:
        WeightsError: no checkpoint, or not one of convattn.
        UntrustedCode: a checkpoint that names code which is not trusted.
        DataError: an image that is missing or cannot be decoded.
        UnknownName: no layer of that name; the message suggests the nearest.
        AttachError: a layer that gives no maps (B, C, H, W), or is not called exactly once.
        InvalidOption: a network without gates, and no layer named; or an `out` that is no folder.
        MissingExtra: Matplotlib or Pillow is not installed.

    Example:
        >>> show("weights.safetensors", ["cat.jpg", "dog.jpg"], "gates", layer="layer3")  # doctest: +SKIP
    """
    # before the work, not after it
    for package in ("matplotlib", "PIL.Image"):
        extra(package, "convattn show")
    paths = [images] if isinstance(images, Path | str) else images
    seen = watch(Path(checkpoint), [Path(path) for path in paths], layer, trust=trust, factories=factories)
    folder = _folder(Path(out))
    content = io.BytesIO()
    np.savez_compressed(content, **_arrays(seen))
    files.write(folder / NUMBERS, content.getvalue())
    with canvas.style():
        _draw(seen, folder)
    return folder


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidOption(f"{out} is no folder and cannot be made one ({error.strerror}): give another.") from error
    return out


def _arrays(seen: Seen) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for site, named in seen.sites.items():
        arrays |= {f"{site}/{name}": array for name, array in named.items()}
    if seen.maps is not None:
        arrays[f"layer/{seen.layer}"] = seen.maps
    words = {"paths": [str(path) for path in seen.paths], "names": seen.names, "classes": seen.about["classes"]}
    return {**arrays, **{key: np.array(value) for key, value in words.items()}, "predictions": seen.predictions}


def _draw(seen: Seen, folder: Path) -> None:
    colours, added = figures.spatial_scale(seen), figures.update_scale(seen)
    for place, name in enumerate(seen.names):
        if added is not None:
            figures.update_map(seen, place, added).save(folder / f"update-{name}.png")
        if colours is not None:
            figures.spatial(seen, place, colours).save(folder / f"spatial-{name}.png")
        if seen.layer is not None:
            figures.maps(seen, place).save(folder / f"layer-{seen.layer}-{name}.png")
    whole = (
        ("channel.png", figures.channel(seen)),
        ("update.png", figures.update(seen)),
        ("pool.png", figures.pool(seen)),
    )
    for file, sheet in whole:
        if sheet is not None:
            sheet.save(folder / file)
