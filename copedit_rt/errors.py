"""The exceptions that users meet, and text that is safe to show them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path


class CopeditError(Exception):
    """Bad input or a broken file: one sentence that names it and the remedy."""

    exit_code = 1


class Fault(CopeditError):
    """Not the input's doing: memory or disk that ran out, or what nobody foresaw. A server's 5xx."""


class Stopped(CopeditError):
    """Work that a signal ended in good order: where it stands and how to go on. Exits as the signal would have."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.exit_code = 128 + signal

    def __reduce__(self) -> tuple[object, ...]:  # so that it comes back from another process
        return type(self), (str(self), self.exit_code - 128)


def failure(about: str, error: BaseException, memory: str) -> CopeditError:
    """Whatever went wrong with `about` as one sentence; the error itself where it is one already.

    memory: the remedy where memory ran out.
    """
    if isinstance(error, CopeditError):
        return error
    # torch raises a RuntimeError on the CPU, a subclass of it on CUDA.
    if isinstance(error, MemoryError) or any(w in str(error) for w in ("out of memory", "allocate memory")):
        told = Fault(f"{about}: memory ran out; {memory}")
    else:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        told = Fault(f"{about}: {said}; this is not foreseen: copedit --debug shows where it happened")
    told.__cause__ = error
    return told


def by_name(text: str, folders: Iterable[Path] = ()) -> str:
    """A text that may be passed on: files as seen from these folders, of other paths without spaces the name alone."""
    roots = "|".join(re.escape(f"{folder}/") for folder in sorted(map(str, folders), key=len, reverse=True))
    text = re.sub(rf"(?<![\w.])(?:{roots})", "", text)
    return re.sub(r"(?<![\w.])/(?:[^\s/:;,()'\"]+/)+([^\s/:;,()'\"]*)", r"\1", text)


def printable(text: object, *, lines: bool = False) -> str:
    r"""A text as a terminal may show it: control characters as \x1b, bytes of a file name that are not UTF-8 as \xe9.

    lines: keep line breaks.
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python reads such a byte
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
