"""The errors a caller may want to tell apart."""


class LeakageError(ValueError):
    """A column tells the future or the label; the message names every such column."""


class PartitionError(ValueError):
    """A partition file cannot be read; the message names the file."""


class WindowError(PartitionError):
    """No partition lies where one is looked for; the message names the folder or the window."""
