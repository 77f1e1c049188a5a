"""Images in: found in folders, decoded once, split by seed, served in augmented batches."""

from convattn.data.batches import Batches, batches, evaluation_batches
from convattn.data.decoding import Scale
from convattn.data.duplicates import Pair, find_clusters, find_duplicates, find_pairs, join_pairs
from convattn.data.images import (
    ARRAY,
    INDEX,
    Findings,
    Images,
    array_bytes,
    decode,
    default_size,
    read_image,
    stored_size,
)
from convattn.data.listing import Found, LeftOut, Listing
from convattn.data.parts import Part, Parts
from convattn.data.source import Source, open_source
from convattn.data.split import Split, check_counts, fold_of, overview, per_class, split

__all__ = [
    "ARRAY",
    "INDEX",
    "Batches",
    "Findings",
    "Found",
    "Images",
    "LeftOut",
    "Listing",
    "Pair",
    "Part",
    "Parts",
    "Scale",
    "Source",
    "Split",
    "array_bytes",
    "batches",
    "check_counts",
    "decode",
    "default_size",
    "evaluation_batches",
    "find_clusters",
    "find_duplicates",
    "find_pairs",
    "fold_of",
    "join_pairs",
    "open_source",
    "overview",
    "per_class",
    "read_image",
    "split",
    "stored_size",
]
