"""Mistakes that a user can make and mend. Bugs use `assert`; everything here is caught by the CLI and shown as one
line."""


class LooplmError(Exception):
    """Base of every error that names a wrong value and says what to do about it."""


class ConfigError(LooplmError):
    """A config, preset, override or command-line value that cannot be used."""


class DataError(LooplmError):
    """A question file, prompt or dataset that cannot be used."""


class CheckpointError(LooplmError):
    """A run folder or checkpoint that is missing, cut short or does not fit the model."""


class TrainingError(LooplmError):
    """Training that cannot continue: a non-finite loss, a full disk, an unwritable folder."""


class FolderError(TrainingError):
    """A folder that cannot be written into, or that another process is writing into."""
