"""The few error types of dlrm-deploy.

Each message says what was seen, what was expected and what to do. The command line prints it without a traceback and
exits with `exit_code`.
"""


class DlrmDeployError(Exception):
    """Base of every error a caller can fix. Anything else that escapes is a bug of ours."""

    exit_code = 3


class ConfigError(DlrmDeployError, ValueError):
    """A model config, recipe or preset name that cannot be right."""


class BatchError(DlrmDeployError, ValueError):
    """A batch whose arrays do not describe valid dense values and bags, or do not fit the model."""


class DataError(DlrmDeployError):
    """A dataset is missing, damaged or not in the expected format."""


class CheckpointError(DlrmDeployError):
    """A checkpoint is missing, damaged, or does not hold the tensors that its model needs."""


class FormatError(DlrmDeployError, ValueError):
    """Values that a row format cannot store, stored rows of another shape than their format, or an unknown format."""


class BundleError(DlrmDeployError):
    """A bundle is missing, damaged, altered, or of a version that this release cannot read."""


class AccuracyError(DlrmDeployError):
    """A converted bundle is less accurate than accepted, or an engine does not score what is stored in it."""

    exit_code = 1


class OutputError(DlrmDeployError):
    """An output cannot be written: it exists already, or the place is full or not writable."""


class EngineError(DlrmDeployError):
    """An engine cannot be built, cannot be opened here, or failed on a batch."""


class MissingDependencyError(DlrmDeployError, ImportError):
    """A package that this call needs is not installed. The message names the extra that brings it."""


class ParityWarning(UserWarning):
    """An engine scores with a bundle for which it has not passed `dlrm-deploy check`."""
