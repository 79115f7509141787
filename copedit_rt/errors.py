"""The one exception that users meet."""


class CopeditError(Exception):
    """Bad input or a broken file: one sentence that names it and the remedy."""
