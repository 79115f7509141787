"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from copedit_training.stages import distributed

Advance = Callable[[int, int, str], None]  # done, of how many, a note
PAUSE = 10.0  # seconds between two lines


def terminal() -> Console:
    """Where a run says how it gets on; of several processes the first one's says it."""
    return Console(stderr=True, quiet=distributed.rank() > 0, emoji=False)


@contextmanager
def counted(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """`shown` on the terminal, of what has no notes: to be called with how many are done, and of how many."""
    with shown(terminal(), what, unit) as advance:
        yield lambda done, total: advance(done, total, "")


@contextmanager
def shown(console: Console, what: str, unit: str, start: int = 0) -> Iterator[Advance]:
    """Gives what is to be called as `unit`s get done, of which `start` were done before."""
    if console.is_terminal or console.quiet:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=console.quiet) as bar:
            item = bar.add_task(what, total=None, completed=start, note="")
            yield lambda done, total, note: bar.update(item, completed=done, total=total, note=note)
    else:
        yield _lines(console, what, unit, start)


def _lines(console: Console, what: str, unit: str, start: int) -> Advance:
    began = said = time.monotonic()

    def advance(done: int, total: int, note: str) -> None:
        nonlocal said
        now = time.monotonic()
        if done < total and done > start + 1 and now - said < PAUSE:
            return
        said = now
        left = timedelta(seconds=round((now - began) / max(1, done - start) * (total - done)))
        text = f"{what}: {unit} {done} of {total}, {left} left{note and ', '}{note}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    return advance
