"""Images in: found in folders, decoded once, split by seed, served in augmented batches."""

from convattn.data.batches import Batches, batches, evaluation_batches
from convattn.data.images import ARRAY, INDEX, Images, decode, read_image, stored_size
from convattn.data.source import Found, LeftOut, Listing, Source, open_source
from convattn.data.split import Split, check_counts, split

__all__ = [
    "ARRAY",
    "INDEX",
    "Batches",
    "Found",
    "Images",
    "LeftOut",
    "Listing",
    "Source",
    "Split",
    "batches",
    "check_counts",
    "decode",
    "evaluation_batches",
    "open_source",
    "read_image",
    "split",
    "stored_size",
]
