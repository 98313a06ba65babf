"""What a user did wrong, told so that it can be mended.

Every message names the key or file, the value found there, and the remedy. Broken invariants of our
own code assert instead.
"""


class TrinityError(Exception):
    """Base of all errors that a user can mend; the command line prints it without a traceback."""

    exit_code = 1


class ConfigError(TrinityError):
    """A configuration key, value or combination that cannot work. Raised before anything starts."""

    exit_code = 2


class DataError(TrinityError):
    """A source, shard or tokenizer that is missing, damaged or does not fit the model."""

    exit_code = 3


class CheckpointError(TrinityError):
    """A checkpoint that is missing, damaged, foreign or hostile, or that could not be written."""

    exit_code = 4


class TrainingError(TrinityError):
    """Training cannot go on, for instance because the loss is not finite."""

    exit_code = 5
