"""What the commands of all packages share: options, progress, JSON, and amounts as users write them."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from copedit_rt.errors import CopeditError, printable
from copedit_rt.files import check_writable as check_writable  # for the commands of other packages
from copedit_rt.listener import Listener

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

    from copedit_rt.images.find import Found

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
MOST = 32767  # of slices: as many as a NIfTI file can have


class _Plain:
    """Help as people read it: no type beside a switch, N or NAME for that of a value, paragraphs that wrap."""

    def __init__(self, *arguments: Any, help: str | None = None, **options: Any) -> None:
        paragraphs = inspect.cleandoc(help or "").split("\n\n")
        whole = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        super().__init__(*arguments, help=whole, **options)  # type: ignore[call-arg]

    def get_params(self, ctx: Any) -> Any:
        shown = super().get_params(ctx)  # type: ignore[misc]
        for option in shown:
            if option.metavar is None:
                words = getattr(getattr(option, "type_descriptor", None), "annotation", None) is str
                option.metavar = "" if getattr(option, "is_flag", False) else "NAME" if words else "N"
        return shown


class Command(_Plain, TyperCommand):
    """One that does something."""


class Group(_Plain, TyperGroup):
    """Of several."""


class Commands(typer.Typer):
    """A group whose commands are `Command`, unless they say otherwise."""

    def command(self, name: str | None = None, **options: Any) -> Any:
        return super().command(name, **{"cls": Command, **options})


def commands(help: str | None = None, kind: type[Group] = Group, **options: Any) -> typer.Typer:
    """An empty group of commands."""
    return Commands(cls=kind, help=help, no_args_is_help=True, context_settings=SETTINGS, **options)


# ---------------------------------------------------------------------------------------------------- options


def flag(*names: str, help: str) -> Any:
    """A switch; help shows no value for it."""
    return typer.Option(*names, metavar="", help=help)


Output = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where the results go.")]
Steps = Annotated[
    int | None,
    typer.Option(min=0, help="Sampler steps; by default the model's. 0: what its prior fills in, as it is."),
]
Solver = Annotated[
    str | None, typer.Option(metavar="ddim|dpm2m", help="First- or second-order sampler; by default the model's.")
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to compute.")]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="auto|float32|bfloat16|float16",
        help="Of the large products; auto is float32 on a CPU, and on a GPU bfloat16 where it has that.",
    ),
]
Quiet = Annotated[bool, flag("-q", "--quiet", help="Say nothing but what went wrong.")]
Verbose = Annotated[bool, flag("-v", "--verbose", help="Also say which model computed what, where and how long.")]
Json = Annotated[bool, flag("--json", help="Print one JSON document on stdout.")]


def numbers(text: str | None, option: str = "--missing-slices") -> list[int] | None:
    """3,4,5 or 3-5 as integers; None for None. Raises CopeditError for anything else."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last <= MOST or len(found) + last - first > MOST:
            raise CopeditError(f"{option} {text[:80]}: expected whole numbers up to {MOST} such as 3,4,5 or 3-5")
        found += range(first, last + 1)
    return found


def choice(text: str | None, option: str, choices: Mapping[str, Any]) -> Any:
    """What a word stands for; None for None. Raises CopeditError for any other word."""
    if text is None:
        return None
    if text.strip().lower() not in choices:
        raise CopeditError(f"{option} {text}: expected {' or '.join(choices)}")
    return choices[text.strip().lower()]


def shard(text: str | None) -> tuple[int, int]:
    """I/N as (I, N), the whole for None. Raises CopeditError for anything else."""
    if text is None:
        return 0, 1
    match = re.fullmatch(r"\s*([0-9]{1,6})\s*/\s*([0-9]{1,6})\s*", text)
    if not match or not 0 <= int(match[1]) <= int(match[2]) or not int(match[2]):
        raise CopeditError(f"--shard {text}: expected I/N, as in 0/4 to 3/4 or 1/4 to 4/4")
    return int(match[1]), int(match[2])


def words(text: str | None) -> tuple[str, ...]:
    """one,two as (one, two)."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def size(text: str | None, option: str = "--max-memory") -> int | None:
    """2GB, 500MB or 1.5g as bytes; None for None. Raises CopeditError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([KMG])(?:i?B)?\s*", text, re.IGNORECASE)
    if not match:
        raise CopeditError(f"{option} {text}: expected an amount such as 2GB or 500MB")
    return int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[match[2].upper()])


def secret(file: Path | None, variable: str = "COPEDIT_TOKEN") -> str | None:
    """What a file holds, or else a variable of the environment: on a command line, everybody could read it."""
    if file is None and not os.environ.get(variable):
        return None
    try:
        text = (file.read_text(encoding="utf-8") if file else os.environ[variable]).strip()
    except (OSError, ValueError) as error:
        raise CopeditError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    if not text.isprintable() or not text.isascii() or " " in text or not text:
        raise CopeditError(f"{file or variable} holds no token: one line of letters and digits is expected")
    return text


def files_by_modality(pairs: Sequence[str] | None, **aliases: Path | None) -> dict[str, Path] | None:
    """--file t1=PATH, or t1=SERIES, and the options that stand for it as {t1: PATH}; None if there is none."""
    files = {name: path for name, path in aliases.items() if path is not None}
    for pair in pairs or ():
        name, _, path = pair.partition("=")
        if not name or not path:
            raise CopeditError(f"--file {pair}: expected MODALITY=PATH, as in --file t1=scan.nii.gz")
        if name in files:
            raise CopeditError(f"--file {pair}: {name} was given already ({files[name]}); give one file a modality")
        files[name] = Path(path)
    return files or None


# ----------------------------------------------------------------------------------------------------- answers


def tell(text: str, style: str | None = None, to: Console | None = None) -> None:
    """A line on stderr, by the console that shows a bar there if one does."""
    (to or console()).print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def say(text: object) -> None:
    """An answer on stdout."""
    typer.echo(printable(text, lines=True))


def show(*what: RenderableType) -> None:
    """Tables on stdout."""
    from rich.console import Console

    for table in what:
        Console(emoji=False).print(table)


def tell_error(error: BaseException, debug: bool = False, to: Console | None = None) -> None:
    """What went wrong on stderr, in one line; debug: and where."""
    if debug:
        print(printable("".join(traceback.format_exception(error)), lines=True), end="", file=sys.stderr)
    tell(f"copedit: {error}", "red", to)


def print_json(data: Any) -> None:
    """One JSON document on stdout; numbers that JSON does not have (NaN, infinities) are null."""
    typer.echo(json.dumps(finite(data), indent=2, default=str, allow_nan=False))


def finite(data: Any) -> Any:
    """The same with None for what JSON does not have: NaN and infinities."""
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def present(
    report: Mapping[str, Any], text: str, paths: Sequence[Path], as_json: bool, remark: str | None = None
) -> None:
    """Print a report that was written: as JSON, or as text and the files; a remark goes to stderr."""
    if remark:
        tell(remark, "yellow")
    if as_json:
        print_json(report)
    else:
        say(text)
        say("\n".join(map(str, paths)))


# ---------------------------------------------------------------------------------------------------- progress


def console() -> Console:
    """Rich's console of stderr."""
    from rich.console import Console

    return Console(stderr=True, emoji=False)  # a path may hold :x:


def progress(quiet: bool = False) -> Progress:
    """A bar on stderr, if that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    shown, text = console(), TextColumn("{task.description}", markup=False)
    # Rich would send stdout to its own console, stderr: right on a terminal, a loss where stdout is a file.
    return Progress(
        *(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        console=shown,
        transient=True,
        disable=quiet or not shown.is_terminal,
        redirect_stdout=bool(sys.stdout and sys.stdout.isatty()),
    )


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """What shows how much of something is done, called with that and all of it."""
    with progress() as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Screen(Listener):
    """Tells on the terminal how a cohort goes: bars and remarks on stderr, outcomes to `say`.

    debug: with a traceback for every study that fails. quiet: only what went wrong. verbose: also what computed.
    """

    def __init__(
        self,
        say: Callable[[str], None] = lambda text: None,
        debug: bool = False,
        quiet: bool = False,
        verbose: bool = False,
    ) -> None:
        self._say, self._debug, self._verbose = (nothing if quiet else say), debug, verbose
        # Of torchrun's processes, the first shows it.
        self._bar = progress(quiet=quiet or os.environ.get("RANK", "0") != "0")
        self._tell = nothing if quiet else partial(tell, to=self._bar.console)
        self._studies, self._sampler, self._build = (self._bar.add_task("", visible=False) for _ in range(3))

    def __enter__(self) -> Screen:
        self._bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._bar.stop()

    def found(self, found: Found, mine: int) -> None:
        self._bar.update(self._studies, description="studies", completed=0, total=mine, visible=mine > 1)
        for study in found:
            if study.source and not study.problem:
                for line in study.source.told():
                    self._tell(f"{study.name}: {line}", "dim")
        for reason, paths in found.reasons(series=False).items():
            files = "a file" if len(paths) == 1 else f"{len(paths)} files"
            self._tell(f"passed over {files}: {reason} ({paths[0]}{', ...' * (len(paths) > 1)})", "dim")

    def began(self, study: str) -> None:
        self._bar.update(self._sampler, description=printable(study), completed=0, total=None, visible=True)

    def step(self, done: int, total: int) -> None:
        self._bar.update(self._sampler, completed=done, total=total)

    def building(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._build, description=what, completed=done, total=total, visible=done < total)

    def remark(self, text: str) -> None:
        self._tell(f"copedit: {text}")

    def failed(self, error: CopeditError) -> None:
        if self._debug:
            tell_error(error, True, self._bar.console)

    def ended(self, entry: Mapping[str, Any], error: CopeditError | None) -> None:
        self._bar.advance(self._studies)
        name = entry["study"]
        for note in (*entry.get("outlived", ()), *entry.get("notes", ())):
            self._tell(f"{name}: {note}", "yellow")
        if error:
            tell_error(error, self._debug, self._bar.console)
        elif entry["status"] == "complete":
            self._say(f"{name}: nothing is missing")
        else:
            kept = entry["outputs"] if entry["status"] == "kept" else entry["kept"]
            for element, path in entry["outputs"].items():
                outcome = "kept (--overwrite replaces it)" if element in kept else "written"
                self._say(f"{name}: {element} {outcome}: {path}")
                if element in entry.get("dicom", {}):
                    self._say(f"{name}: {element} written as DICOM: {entry['dicom'][element]}")
            for kind, told in (("preview", "picture"), ("report", "page")):
                if kind in entry:
                    self._say(f"{name}: {told} {entry['status']}: {entry[kind]}")
        if self._verbose and not error:
            self._tell(f"{name}: {_how(entry)}", "dim")


def _how(entry: Mapping[str, Any]) -> str:
    """By what a study's outputs were made."""
    if not (record := entry.get("record")):
        return f"{entry['status']}, {entry['seconds']:.1f} s"
    from copedit_rt.schedule import drawn

    where = f"{record['engine']} on {record['device']} in {record['dtype']}"
    how = f"{record['model']} by {where}; {drawn(record['sampler'])}"
    return f"{how}; missing {', '.join(record['missing'])}; {entry['seconds']:.1f} s"


def nothing(*said: object) -> None:
    """Says nothing."""
