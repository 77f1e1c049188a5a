"""What the numbers of the gates say: a row for each gate, and a word."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convattn import tables
from convattn.errors import DataError
from convattn.showing.watching import axes_of

Array = NDArray[np.float32]
NUMBERS = "gates.npz"
LEGEND = "from, to: over channels or positions; variation: standard deviation over the images"
UPDATE_LEGEND = "update: root mean square of what is added over that of the map; from, to: of its absolute value"
POOL_LEGEND = "pool: 1 + change of the pooled vector, in units of its root mean square"
UPDATE = "update"
NO_GATES = (UPDATE, "map", "pooled", "head", "strength")
# a gate that changes a map by less than a hundredth does nothing that another seed would not do
NOTHING = 0.01
# below this standard deviation over the images a gate is a constant
CONSTANT = 1e-3


@dataclass(frozen=True)
class Row:
    """One gate of one site, what it adds to the map, or its pooling head.

    `kind` is what the gate varies over: `"channel"`, `"spatial"`, `"height"`, `"width"`, `"group"` (of channels), or
    several as in `"channel and spatial"`, or `"whole map"`; or it is `"pool"`; or `"update"` with what it varies over.
    `mean` is the mean gate; `low` and `high` are its range over what it varies over, of the mean over the images;
    `variation` is its standard deviation over the images, averaged over the same, None for one image; `strength` is
    None where the gates are applied as they are.

    A pooling head has no gate; its numbers are those of 1 + (output - pooled) / rms(pooled): 1 where it does nothing.

    Of what is added, `mean` is its root mean square over that of the map, in the mean over the images, and the others
    are those of its absolute value in the same unit. It does nothing where that `mean` is below 0.01.

    `word` is `"does nothing"` (the gate differs from 1 by less than 0.01, in the mean over the images, at every channel
    or position), `"constant"` (its standard deviation over the images is below 0.001 everywhere; needs two images),
    `"not finite"` or `"active"`.
    """

    site: str
    kind: str
    mean: float
    low: float
    high: float
    variation: float | None
    strength: float | None
    word: str


@dataclass(frozen=True)
class Table:
    """The gates of a network in the order of its layers; print it to see them."""

    images: int
    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "No gates."
        cells = [("site", "gate", "mean", "from", "to", "variation", "strength", "")]
        for row in self.rows:
            numbers = (f"{value:.3f}" for value in (row.mean, row.low, row.high))
            varies, strength = _or_dash(row.variation, ".4f"), _or_dash(row.strength, "+.3f")
            cells.append((row.site, row.kind, *numbers, varies, strength, row.word))  # type: ignore[arg-type]
        legends = {"pool": POOL_LEGEND, UPDATE: UPDATE_LEGEND}
        kinds = {row.kind.partition(" ")[0] for row in self.rows}
        legend = [words for kind, words in legends.items() if kind in kinds]
        return "\n".join([*tables.aligned(cells, "<<>>>>><"), LEGEND, *legend])


def table(folder: Path | str) -> Table:
    """What the sites of a folder that `show` wrote do: one row for each gate.

    Raises:
        DataError: no such folder.

    Example:
        >>> print(table(show("weights.safetensors", ["cat.jpg", "dog.jpg"], "gates")))  # doctest: +SKIP
    """
    path = Path(folder) / NUMBERS
    if not path.is_file():
        raise DataError(f"{folder} holds no {NUMBERS}: give a folder that `convattn show` wrote.")
    sites: dict[str, dict[str, Array]] = {}
    with np.load(path) as arrays:
        images = len(arrays["paths"])
        for key in arrays.files:
            site, _, name = key.rpartition("/")
            # the feature maps are large and no gates
            if site and not key.startswith("layer/"):
                sites.setdefault(site, {})[name] = arrays[key]
    return summarise(sites, images)


def summarise(sites: dict[str, dict[str, Array]], images: int) -> Table:
    """The rows of arrays as in `Seen.sites`."""
    rows = []
    for site, arrays in sites.items():
        strength = arrays["strength"].item() if "strength" in arrays else None
        gates = gates_of(arrays)
        if "pooled" in arrays:
            gates["pool"] = relative(arrays)
        rows += [_row(site, kind, gate, strength) for kind, gate in gates.items()]
        if UPDATE in arrays:
            rows.append(_row_of_update(site, arrays, strength))
    return Table(images, tuple(rows))


def gates_of(arrays: dict[str, Array]) -> dict[str, Array]:
    """The gates of a site, by what they vary over."""
    return {name: array for name, array in arrays.items() if name not in NO_GATES}


def output(arrays: dict[str, Array]) -> Array:
    """What a site with a pooling head gives (B, C): the network's pooling, blended with the head's vector."""
    pooled, head = arrays["pooled"], arrays["head"]
    return pooled + arrays["strength"] * (head - pooled) if "strength" in arrays else head


def relative(arrays: dict[str, Array]) -> Array:
    """The change that a pooling head makes (B, C), like a gate: 1 + (output - pooled) / rms(pooled)."""
    pooled = arrays["pooled"]
    rms = np.sqrt((pooled**2).mean(axis=1, keepdims=True))
    return np.asarray(1 + (output(arrays) - pooled) / np.maximum(rms, np.finfo(np.float32).tiny))


def _row(site: str, kind: str, values: Array, strength: float | None) -> Row:
    gate = values.reshape(len(values), -1).astype(np.float64)
    average, spread = gate.mean(axis=0), gate.std(axis=0)
    variation = float(spread.mean()) if len(gate) > 1 else None
    low, high = float(average.min()), float(average.max())
    return Row(site, kind, float(average.mean()), low, high, variation, strength, _word(gate, spread))


def _row_of_update(site: str, arrays: dict[str, Array], strength: float | None) -> Row:
    update = arrays[UPDATE]
    sizes = np.abs(update.reshape(len(update), -1).astype(np.float64))
    ratio = float(np.sqrt((sizes**2).mean(axis=1)).mean())
    average, spread = sizes.mean(axis=0), sizes.std(axis=0)
    word = "not finite" if not np.isfinite(sizes).all() else "does nothing" if ratio < NOTHING else "active"
    of_map = map(int, arrays["map"]) if "map" in arrays else update.shape[1:]
    axes = axes_of(update.shape, (len(update), *of_map))
    kind = f"{UPDATE} ({axes})" if axes else UPDATE
    variation = float(spread.mean()) if len(sizes) > 1 else None
    return Row(site, kind, ratio, float(average.min()), float(average.max()), variation, strength, word)


def _word(gate: NDArray[np.float64], spread: NDArray[np.float64]) -> str:
    if not np.isfinite(gate).all():
        return "not finite"
    if np.abs(gate - 1).mean(axis=0).max() < NOTHING:
        return "does nothing"
    return "constant" if len(gate) > 1 and spread.max() < CONSTANT else "active"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
