"""What goes wrong when raw data are read."""


class SourceError(ValueError):
    """Raw data that cannot be read; the message names the file or item and how to mend it."""
