"""The exceptions that users meet."""


class CopeditError(Exception):
    """Bad input or a broken file: one sentence that names it and the remedy."""

    exit_code = 1


class Stopped(CopeditError):
    """Work that a signal ended in good order: where it stands and how to go on. Exits as the signal would have."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.exit_code = 128 + signal
