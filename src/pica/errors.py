"""Errors that a user can act on: each message says what is wrong, with which value, where, and how to put it right.

The command line prints one of these as a single sentence and exits with status 2. Anything else that reaches it is a bug.
This module imports nothing, so that every floor of the package may use it.
"""


class PicaError(Exception):
    """Base of every error that the command line prints without a traceback."""


class ConfigError(PicaError, ValueError):
    """A recipe, a configuration or a command-line argument is wrong; the message lists every problem found."""


class VersionError(PicaError, ImportError):
    """PyTorch, PEFT or transformers is installed in a version that this version of pica does not work with."""


class LaunchError(ConfigError):
    """The launcher's settings do not fit a run. Raised in all of its processes alike, so that one of them may speak."""


class ModuleError(ConfigError, TypeError):
    """PEFT cannot train a module that was named in the way it was asked for. A TypeError, as PEFT raises for these."""


class TargetError(PicaError, ValueError):
    """An entry of `target_modules` matches no layer of the model."""


class QuantisationError(PicaError, TypeError):
    """A base layer is quantised in a way that cannot do what was asked, such as being merged into."""


class RankError(PicaError, ValueError):
    """A rank is outside what a layer allows."""


class BasisError(PicaError, ValueError):
    """A frozen weight has no usable spectral basis, for instance because it is not finite."""


class BasisMismatchError(PicaError, RuntimeError):
    """A saved adapter was trained against another basis than the one computed from this base model."""


class DataError(PicaError, ValueError):
    """A data file is missing, empty or malformed; the message names the file and the line."""


class AdapterFileError(PicaError, ValueError):
    """A folder does not hold a readable adapter."""


class TrainingError(PicaError, RuntimeError):
    """Training cannot go on, for instance because the loss is not finite."""


class OutputError(PicaError, OSError):
    """Results cannot be written: the folder is not empty, not writable, or the disk is full."""


class InUseError(OutputError):
    """Another process is writing there."""


class ExportError(PicaError, ValueError):
    """An adapter cannot be exported as asked, or what was written does not reproduce it."""
