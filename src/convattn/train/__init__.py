"""One run: a network and images in, scores out."""

from convattn.train.recipe import Recipe
from convattn.train.run import Progress, Run, RunSpec, evaluation_shape, execute, start_accuracy
from convattn.train.store import describe, finished, repair, run_name, trial_name, verified

__all__ = [
    "Progress",
    "Recipe",
    "Run",
    "RunSpec",
    "describe",
    "evaluation_shape",
    "execute",
    "finished",
    "repair",
    "run_name",
    "start_accuracy",
    "trial_name",
    "verified",
]
