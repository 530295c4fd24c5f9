"""One small tree of errors; each message is one line that names the cause and the remedy.

Jobs turn `ConfigError`, `DataError`, `StoreError` and `CheckpointError` into that line and exit code 2 (the
user can fix it before anything was lost), `ClusterError` and `DivergedError` into exit code 1.
"""

__all__ = [
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "DataError",
    "DivergedError",
    "JebmError",
    "StoreError",
]


class JebmError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(JebmError):
    """A configuration value is wrong or cannot be satisfied; the message names the dotted key."""


class DataError(JebmError):
    """An image source or a data set cannot be read; the message names the file."""


class StoreError(JebmError):
    """Object storage refused or could not be reached; the message names the URI and the remedy."""


class CheckpointError(JebmError):
    """A checkpoint is missing, damaged, or does not fit the model it is loaded into."""


class ClusterError(JebmError):
    """Ray ended a run that an error of ours did not end; the message has Ray's reason."""


class DivergedError(JebmError):
    """The loss is no longer finite; the message names the step. It moved no parameter."""
