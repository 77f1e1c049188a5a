"""One run: a network and images in, scores out."""

from convattn.train.recipe import Recipe
from convattn.train.run import (
    Progress,
    Run,
    RunSpec,
    evaluation_shape,
    execute,
    finished,
    run_name,
    start_accuracy,
    trial_name,
    write,
)

__all__ = [
    "Progress",
    "Recipe",
    "Run",
    "RunSpec",
    "evaluation_shape",
    "execute",
    "finished",
    "run_name",
    "start_accuracy",
    "trial_name",
    "write",
]
