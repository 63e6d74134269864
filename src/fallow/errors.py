"""fallow's exceptions: each is also the standard-library type a caller would expect, and its message names the mend."""


class FallowError(Exception):
    """Base of every error fallow raises on purpose. The command line prints it as one line."""


class ConfigError(FallowError, ValueError):
    """A setting is out of range, unknown, or contradicts another one (exit code 2)."""


class UnsupportedModelError(FallowError, NotImplementedError):
    """The model's family or shape is not one fallow knows; the message lists what was looked for (exit code 2)."""


class DataError(FallowError, ValueError):
    """The training data is empty, unreadable or does not fit the model (exit code 2)."""


class CheckpointError(FallowError, RuntimeError):
    """A checkpoint is corrupt, truncated, of another model, or could not be written (exit code 1)."""


class BackendError(FallowError, RuntimeError):
    """A kernel backend was asked for that cannot run here (exit code 2)."""


class GateError(FallowError, AssertionError):
    """A correctness gate is red: no speed-up is printed (exit code 1)."""
