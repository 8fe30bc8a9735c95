"""What the command line tells from other failures."""


class SettingError(ValueError):
    """A setting that is unknown, missing, or not what it needs to be."""
