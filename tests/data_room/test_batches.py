"""Batches against images searched for in the padded originals."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from convattn.data import Batches, Images, batches, evaluation_batches

MEAN, STD = (0.1, 0.5, 0.9), (0.2, 0.25, 0.5)


def plan(*, count: int = 20, stored: int = 16, size: int = 16, batch: int = 6, flip: bool = True) -> Batches:
    """Images of noise, no two windows of which are equal."""
    random = np.random.default_rng(1)
    images = Images(
        pixels=random.integers(0, 256, size=(count, stored, stored, 3), dtype=np.uint8),
        paths=tuple(f"{index}.png" for index in range(count)),
        labels=random.integers(0, 3, size=count),
        parts=("",) * count,
        classes=("a", "b", "c"),
        size=size,
        left_out=(),
    )
    # every second one is for validation
    return Batches(images, np.arange(0, count, 2), batch, MEAN, STD, 7, flip)


def windows(served: Batches, padding: int) -> dict[bytes, tuple[int, int, int, bool]]:
    """Every window of every padded training image, by its bytes: (index, top, left, mirrored)."""
    size, found = served.images.size, {}
    for index in served.indices:
        original = served.images.pixels[index]
        side = original.shape[0] + 2 * padding
        padded = np.zeros((side, side, 3), np.uint8)
        padded[padding : side - padding, padding : side - padding] = original
        for top in range(side - size + 1):
            for left in range(side - size + 1):
                window = padded[top : top + size, left : left + size]
                found[window.tobytes()] = (int(index), top, left, False)
                found[window[:, ::-1].tobytes()] = (int(index), top, left, True)
    return found


def as_bytes(x: torch.Tensor) -> np.ndarray:
    """The bytes of the images that a batch was made of."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((x.double() * std + mean) * 255).permute(0, 2, 3, 1).round().to(torch.uint8).numpy()


def located(served: Batches, epoch: int, padding: int, **options: int) -> list[tuple[int, int, int, bool]]:
    """Where each image of an epoch comes from; a KeyError if it is no window of a padded image."""
    known = windows(served, padding)
    places = []
    for x, labels in batches(served, epoch, **options):
        for image, label in zip(as_bytes(x), labels, strict=True):
            place = known[np.ascontiguousarray(image).tobytes()]
            assert label == served.images.labels[place[0]]
            places.append(place)
    return places


def test_shapes_and_types() -> None:
    served = plan()
    found = list(batches(served, 0))
    assert len(found) == len(served) == 1
    x, labels = found[0]
    assert x.shape == (6, 3, 16, 16)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert labels.dtype == torch.int64
    assert len(list(batches(plan(batch=5), 0))) == 2
    assert len(list(batches(plan(batch=10), 0))) == 1


def test_small_images_are_padded_and_cropped() -> None:
    # an eighth of the side on each of its sides
    served = plan(batch=5)
    places = [place for epoch in range(60) for place in located(served, epoch, padding=2)]
    assert {top for _, top, _, _ in places} == {left for _, _, left, _ in places} == set(range(5))
    assert len({(top, left) for _, top, left, _ in places}) == 25


def test_large_images_are_cropped_from_what_is_stored() -> None:
    served = plan(stored=19, batch=5)
    places = [place for epoch in range(40) for place in located(served, epoch, padding=0)]
    assert {(top, left) for _, top, left, _ in places} == {(top, left) for top in range(4) for left in range(4)}


def test_half_of_the_images_are_mirrored() -> None:
    places = [place for epoch in range(40) for place in located(plan(batch=5), epoch, padding=2)]
    # 400 draws, standard deviation 10
    assert 160 < sum(mirrored for *_, mirrored in places) < 240


def test_none_is_mirrored_without_flip() -> None:
    places = [place for epoch in range(10) for place in located(plan(batch=5, flip=False), epoch, padding=2)]
    assert not any(mirrored for *_, mirrored in places)


def test_an_epoch_is_a_permutation_of_the_training_images() -> None:
    served = plan(batch=5)
    orders = [[index for index, *_ in located(served, epoch, padding=2)] for epoch in range(4)]
    assert all(sorted(order) == served.indices.tolist() for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_images_that_fill_no_batch_are_left_out_of_the_epoch_and_not_of_all() -> None:
    served = plan(batch=4)
    epochs = [[index for index, *_ in located(served, epoch, padding=2)] for epoch in range(10)]
    assert all(len(set(order)) == len(order) == 8 for order in epochs)
    assert set().union(*epochs) == set(served.indices)


def test_every_batch_is_augmented_in_its_own_way() -> None:
    places = located(plan(count=120, batch=20), 0, padding=2)
    crops = [[place[1:3] for place in places[start : start + 20]] for start in (0, 20, 40)]
    mirrored = [[place[3] for place in places[start : start + 20]] for start in (0, 20, 40)]
    assert crops[0] != crops[1] != crops[2] != crops[0]
    assert mirrored[0] != mirrored[1] != mirrored[2] != mirrored[0]


def test_batches_are_functions_of_seed_and_epoch() -> None:
    served = plan(batch=5)
    first = torch.cat([x for x, _ in batches(served, 3)])
    # whatever else is drawn in between
    torch.rand(5)
    np.random.default_rng(0).random(5)
    assert torch.equal(torch.cat([x for x, _ in batches(served, 3)]), first)
    assert not torch.equal(torch.cat([x for x, _ in batches(served, 4)]), first)
    assert not torch.equal(torch.cat([x for x, _ in batches(replace(served, seed=8), 3)]), first)


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_an_epoch_can_be_gone_on_with(first: int) -> None:
    served = plan(batch=3)
    whole = list(batches(served, 2))
    rest = list(batches(served, 2, first=first))
    assert len(rest) == 3 - first
    for (x, labels), (expected, expected_labels) in zip(rest, whole[first:], strict=True):
        assert torch.equal(x, expected)
        assert torch.equal(labels, expected_labels)


def test_order_and_crops_do_not_depend_on_flip() -> None:
    flipped, plain = (located(plan(batch=5, flip=flip), 1, padding=2) for flip in (True, False))
    assert [place[:3] for place in flipped] == [place[:3] for place in plain]


def test_evaluation_is_in_order_and_not_augmented() -> None:
    served = plan()
    indices = np.array([3, 1, 19, 0, 5, 4, 8])
    found = list(evaluation_batches(served, indices))
    assert [len(x) for x in found] == [6, 1]
    assert np.array_equal(as_bytes(torch.cat(found)), served.images.pixels[indices])


@pytest.mark.parametrize(("stored", "margin"), [(20, 2), (19, 1), (17, 0)])
def test_evaluation_takes_the_centre(stored: int, margin: int) -> None:
    served = plan(stored=stored)
    indices = np.arange(20)
    seen = as_bytes(torch.cat(list(evaluation_batches(served, indices))))
    assert np.array_equal(seen, served.images.pixels[:, margin : margin + 16, margin : margin + 16])


def test_normalisation() -> None:
    served = plan()
    x = next(evaluation_batches(served, np.array([4])))
    for channel in range(3):
        expected = (served.images.pixels[4, :, :, channel] / 255 - MEAN[channel]) / STD[channel]
        assert np.abs(x[0, channel].numpy() - expected).max() < 1e-5


def test_the_images_are_not_changed() -> None:
    served = plan()
    before = served.images.pixels.copy()
    for epoch in range(5):
        list(batches(served, epoch))
    assert np.array_equal(served.images.pixels, before)


def test_batches_are_never_fewer_than_one() -> None:
    served = plan(batch=50)
    assert len(served) == 1
    assert [len(labels) for _, labels in batches(served, 0)] == [10]
