"""The images of a run as a training function of the user's own sees them."""

import pickle

import numpy as np
import pytest
import torch
from test_batches import plan
from torch.utils.data import DataLoader, Subset

from convattn.data import Parts, Split, evaluation_batches

SPLIT = Split(train=np.arange(0, 12, 2), validation=np.array([1, 3]), test=np.arange(12, 20))


@pytest.mark.parametrize(("stored", "size"), [(16, 16), (18, 16)])
def test_images_are_those_of_an_evaluation(stored: int, size: int) -> None:
    served = plan(stored=stored, size=size)
    parts = Parts.of(served, SPLIT)
    for part, indices in ((parts.train, SPLIT.train), (parts.validation, SPLIT.validation), (parts.test, SPLIT.test)):
        expected = torch.cat(list(evaluation_batches(served, indices)))
        assert len(part) == len(indices) and expected.shape[2:] == (size, size)
        assert torch.equal(torch.stack([x for x, _ in part]), expected)
        loaded = [x for x, _ in DataLoader(part, batch_size=3)]
        assert torch.equal(torch.cat(loaded), expected)
        assert part.paths == [f"{index}.png" for index in indices]


def test_labels_of_test_images_are_hidden() -> None:
    served = plan()
    parts = Parts.of(served, SPLIT)
    assert [label for _, label in parts.train] == parts.train.labels.tolist() == served.images.labels[::2][:6].tolist()
    assert {label for _, label in parts.test} == set(parts.test.labels.tolist()) == {-1}
    assert parts.classes == ("a", "b", "c")


def test_a_place_as_of_a_list() -> None:
    part = Parts.of(plan(), SPLIT).train
    assert torch.equal(part[-1][0], part[5][0])
    with pytest.raises(IndexError):
        part[6]
    assert [label for _, label in Subset(part, [4, 1])] == [part.labels[4], part.labels[1]]


def test_it_can_be_given_to_the_processes_of_a_loader() -> None:
    part = pickle.loads(pickle.dumps(Parts.of(plan(), SPLIT).train))
    assert len(list(DataLoader(part, batch_size=2, num_workers=1))) == 3
