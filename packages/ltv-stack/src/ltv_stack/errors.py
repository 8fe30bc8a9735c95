"""The errors a caller may want to tell apart."""


class LeakageError(ValueError):
    """A column tells the future or the label; the message names every such column."""


class PartitionError(ValueError):
    """A partition file cannot be read; the message names the file."""
