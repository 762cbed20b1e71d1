"""The error of exports."""


class ExportError(ValueError):
    """A model that a format cannot express, or options that contradict each other; says which
    format or option does."""
