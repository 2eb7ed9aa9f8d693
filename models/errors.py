"""The one thing all of Vitrine's own errors share."""


class VitrineError(Exception):
    """Something that the user can mend; the message says what is wrong and what to do. The command prints it bare."""
