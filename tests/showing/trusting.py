"""`show` for the checkpoints of these tests, whose networks are functions of a file."""

import json
from pathlib import Path
from typing import Any

import safetensors

from convattn import showing


def show(checkpoint: Path, images: Any, out: Path, **options: Any) -> Path:
    about = {}
    if checkpoint.exists():
        with safetensors.safe_open(checkpoint, framework="pt") as file:
            about = json.loads(file.metadata()["convattn"])
    return showing.show(checkpoint, images, out, **{"trust": about.get("backbone", ()), **options})
