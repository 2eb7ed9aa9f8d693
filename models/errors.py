"""The base class of Vitrine's errors."""


class VitrineError(Exception):
    """An error that the user can fix. The message says what is wrong and what to do; the CLI prints only that."""
