"""A series: the files of one acquisition, in the order of its slices, and whether they make a volume."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from copedit_rt.errors import printable
from copedit_rt.images.dicom.headers import ENHANCED_MR, Header

FEWEST = 3  # slices of a volume
UNEVEN = 0.1  # of the spacing: how much distances between slices may differ
TILTED = 0.1  # pixels: how far the last slice may be shifted against the first


@dataclass(frozen=True)
class Series:
    """One volume's files. echo: its number from 1 where a series holds several, as of a PD and T2 in one."""

    headers: tuple[Header, ...]
    echo: int = 0

    @property
    def first(self) -> Header:
        return self.headers[0]

    @property
    def key(self) -> str:
        """What names it after --file t1=."""
        return (self.first.number or self.first.series) + f"e{self.echo}" * bool(self.echo)

    @property
    def said(self) -> str:
        """What the scanner calls it."""
        return self.first.description or self.first.protocol or self.first.sequence or "without description"

    def __str__(self) -> str:
        return printable(f"{self.key} ({self.said})")

    @property
    def file_name(self) -> str:
        """A name for the whole, as if it were one file."""
        return f"series {self}".replace("/", "_").replace("\\", "_")[:120]

    @property
    def multi_frame(self) -> bool:
        return self.first.frames > 1 or self.first.sop_class == ENHANCED_MR

    @property
    def voxels(self) -> int:
        return sum(h.rows * h.columns * h.frames for h in self.headers)

    @cached_property
    def normal(self) -> NDArray[np.float64]:
        """Of the first slice's plane, LPS."""
        row, column = np.reshape(self.first.orientation or (1, 0, 0, 0, 1, 0), (2, 3))
        return np.cross(row, column)

    def places(self) -> NDArray[np.float64]:
        """Where the slices lie along the normal [n], mm."""
        return np.array([h.position or (0, 0, 0) for h in self.headers]) @ self.normal

    def no_volume(self) -> str | None:
        """Why it is none that could be filled in, by its headers; None where it may be one, multi-frame files too."""
        if self.multi_frame:
            return None
        if any(h.position is None or h.orientation is None or h.spacing is None for h in self.headers):
            return "its images have no position in space"
        if np.ptp(np.array([h.orientation for h in self.headers]), axis=0).max() > 1e-3:
            return "its slices lie in several directions, as those of a localizer"
        if max(Counter(np.round(self.places(), 3)).values()) > 1:
            return "several images of each slice: a series over time, of echoes or of diffusion"
        if len(self.headers) < FEWEST:
            return "a single image" if len(self.headers) == 1 else f"{len(self.headers)} images only"
        return None

    def fault(self) -> str | None:
        """What is wrong with its grid, in a sentence's part with the remedy; None where nothing is."""
        if self.multi_frame:
            return None
        shapes = {(h.rows, h.columns, h.spacing) for h in self.headers}
        if len(shapes) > 1:
            return "its images differ in size; export it again"
        places = np.sort(self.places())
        steps = np.diff(places)
        usual = float(np.median(steps))
        if steps.max() - steps.min() > UNEVEN * usual:
            apart = f"{steps.min():.3g} to {steps.max():.3g} mm"
            return f"its slices are unevenly spaced ({apart}), so some may be missing; export it again"
        positions = np.array([h.position for h in self.headers])[np.argsort(self.places())]
        shift = positions[-1] - positions[0]
        aside = float(np.linalg.norm(shift - (shift @ self.normal) * self.normal))
        if aside > TILTED * min(self.first.spacing or (1, 1)):
            return f"its slices are shifted against each other by {aside:.3g} mm (a tilted gantry); export it untilted"
        return None


def group(headers: Iterable[Header]) -> tuple[list[Series], int]:
    """The series that files are of, and how many files were duplicates. In the order of their numbers."""
    seen: set[str] = set()
    parts: dict[str, list[Header]] = defaultdict(list)
    duplicates = 0
    for header in headers:
        duplicates += header.instance in seen
        if header.instance not in seen:
            seen.add(header.instance)
            parts[header.series].append(header)
    series = [one for part in parts.values() for one in _split(part)]
    return sorted(series, key=_order), duplicates


def _order(series: Series) -> tuple[float, str, int]:
    number = series.first.number
    return float(number) if number.lstrip("-").isdecimal() else np.inf, series.first.series, series.echo


def _split(headers: Sequence[Header]) -> list[Series]:
    """By echo times, where each time has one image at every place: then they are volumes of their own."""
    times: dict[float | None, list[Header]] = defaultdict(list)
    for header in headers:
        times[header.echo_time].append(header)
    one = Series(_sorted(headers))
    if not 1 < len(times) < 5 or None in times or one.multi_frame:
        return [one]
    echoes = [Series(_sorted(times[time]), i) for i, time in enumerate(sorted(times, key=float), 1)]  # type: ignore[arg-type]
    whole = all(_same_places(e, echoes[0]) and e.no_volume() is None for e in echoes)
    return echoes if whole else [one]


def _same_places(one: Series, other: Series) -> bool:
    there, here = one.places(), other.places()
    return there.shape == here.shape and np.allclose(there, here, atol=1e-2)


def _sorted(headers: Sequence[Header]) -> tuple[Header, ...]:
    """Along the normal of the first."""
    one = Series(tuple(headers))
    return tuple(headers[i] for i in np.argsort(one.places(), kind="stable"))
