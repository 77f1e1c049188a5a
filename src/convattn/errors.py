"""Every error that convattn raises on purpose.

    ConvattnError
    ├── UnknownName        (LookupError)    no attention, network or layer of that name
    ├── InvalidOption      (ValueError)     an option out of its range
    ├── ShapeMismatch      (ValueError)     a tensor of another shape than the module takes
    ├── LayoutError        (ValueError)     a state dict that fits no known layout, or several
    ├── WeightsError       (ValueError)     a checkpoint of another network, or none at all
    ├── AttachError        (ValueError)     a place where nothing can be attached
    ├── DataError          (ValueError)     images or folders that cannot be used
    ├── ComparisonError    (ValueError)     a comparison folder that holds something else
    ├── DamagedFile        (ValueError)     a file of a comparison that is not what was written
    ├── UntrustedCode      (ValueError)     code that a file names and the user does not
    ├── RunFailed          (RuntimeError)   a run that broke, not through the user's request
    ├── BackendUnavailable (RuntimeError)   a backend that was asked for, and does not serve the map
    └── MissingExtra       (ImportError)    an optional dependency that is not installed

A message is one line: where, what was expected, what came, what to do. The command line prints it to stderr and
exits with 2, for `RunFailed` with 1.
"""


class ConvattnError(Exception):
    """Root of all errors raised on purpose."""


class UnknownName(ConvattnError, LookupError):
    """A name that is not registered."""


class InvalidOption(ConvattnError, ValueError):
    """An option with a value that it cannot take."""


class ShapeMismatch(ConvattnError, ValueError):
    """A tensor of a shape that the module does not take."""


class LayoutError(ConvattnError, ValueError):
    """A state dict of no known layout, or of several."""


class WeightsError(ConvattnError, ValueError):
    """Weights that do not belong to the network."""


class AttachError(ConvattnError, ValueError):
    """Attention that cannot be attached where it was asked for."""


class DataError(ConvattnError, ValueError):
    """Images or folders that cannot be used."""


class ComparisonError(ConvattnError, ValueError):
    """A comparison folder that holds something else."""


class DamagedFile(ConvattnError, ValueError):
    """A file of a comparison that is not what was written."""


class UntrustedCode(ConvattnError, ValueError):
    """Code that a file names, and that was not run since the user did not name it."""


class RunFailed(ConvattnError, RuntimeError):
    """A training run that broke."""


class BackendUnavailable(ConvattnError, RuntimeError):
    """A backend that was asked for, and that does not serve what it was given."""


class MissingExtra(ConvattnError, ImportError):
    """An optional dependency that is not installed."""
