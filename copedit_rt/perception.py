"""What the network perceives in a study, and how that compares with what the files say.

The network reads images, not names. From the observed elements alone it states how many are missing, which,
and, one image at a time, what each looks like. `contradictions` sets this beside what the files say;
`examine` adds what needs no network: blank slices, constant and non-finite volumes. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from rich.console import RenderableType

    from copedit_rt.images.nifti import Volume


@dataclass(frozen=True)
class Perception:
    """Probabilities from the prompt heads of one study with m elements.

    count: P(c elements are missing), c = 1..m-1; sums to 1. None missing is not a class: it means little
    then.
    missing: P(element i is missing), i = 0..m-1.
    identity: per observed element, by its name: P(that one image is element i), i = 0..m-1; sums to 1.
    elements: names of the m elements.
    """

    count: list[float]
    missing: list[float]
    identity: dict[str, list[float]]
    elements: tuple[str, ...]

    @classmethod
    def from_logits(
        cls, elements: Sequence[str], count: ArrayLike, position: ArrayLike, alone: Mapping[str, ArrayLike]
    ) -> Perception:
        """count [m-1] and position [m]: logits of the heads over all observed elements; alone: per observed
        element the position logits [m] when it is the only one given.

        With one image given exactly one element is present. The position logits l are log odds of "missing",
        so P(only i present) is proportional to prod_j p_j * (1 - p_i) / p_i, that is to exp(-l_i): a softmax
        of -l.
        """
        position = np.asarray(position, dtype=np.float64)
        return cls(
            count=_softmax(count),
            missing=(0.5 * (1 + np.tanh(position / 2))).tolist(),
            identity={name: _softmax(-np.asarray(logits, dtype=np.float64)) for name, logits in alone.items()},
            elements=tuple(elements),
        )

    @property
    def count_missing(self) -> int:
        """The likeliest number of missing elements."""
        return 1 + int(np.argmax(self.count))

    @property
    def which_missing(self) -> tuple[str, ...]:
        """The elements more likely missing than not."""
        return tuple(name for name, p in zip(self.elements, self.missing, strict=True) if p > 0.5)

    def looks_like(self, name: str) -> tuple[str, float]:
        """What the observed element called `name` looks like, and with what probability."""
        best = int(np.argmax(self.identity[name]))
        return self.elements[best], self.identity[name][best]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: probabilities keyed by number, by element, by element and element."""
        return {
            "count": {str(c): p for c, p in enumerate(self.count, start=1)},
            "missing": dict(zip(self.elements, self.missing, strict=True)),
            "identity": {n: dict(zip(self.elements, p, strict=True)) for n, p in self.identity.items()},
        }


def _softmax(logits: ArrayLike) -> list[float]:
    values = np.asarray(logits, dtype=np.float64)
    exp = np.exp(values - values.max())
    return (exp / exp.sum()).tolist()


@dataclass(frozen=True)
class Finding:
    """One thing that `inspect` points out. flag: something is wrong; otherwise it is a remark.

    element: the volume it is about, where it is about one.
    """

    kind: str
    text: str
    flag: bool = True
    element: str | None = None


@dataclass
class Report:
    """One study: what the files say, what the network perceives, what was found."""

    name: str
    task: str
    files: dict[str, str]
    missing: tuple[str, ...] = ()
    missing_slices: tuple[int, ...] = ()
    perception: Perception | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def flagged(self) -> bool:
        return any(finding.flag for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        perceived = self.perception
        return {
            "study": self.name,
            "task": self.task,
            "files": self.files,
            "missing": list(self.missing),
            "missing_slices": list(self.missing_slices),
            "perceived": None
            if perceived is None
            else {
                "count_missing": perceived.count_missing,
                "which_missing": list(perceived.which_missing),
                "looks_like": {name: perceived.looks_like(name)[0] for name in perceived.identity},
                "probability": perceived.to_dict(),
            },
            "findings": [asdict(finding) for finding in self.findings],
            "consistent": not self.flagged,
        }

    def render(self) -> RenderableType:
        """A Rich table over the elements, and the findings under it."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text

        perceived = self.perception
        table = Table(title=escape(self.name), title_justify="left", title_style="bold")
        for heading in ("element", "files say", "P(missing)", "looks like"):
            table.add_column(heading)
        elements = perceived.elements if perceived else tuple(dict.fromkeys([*self.files, *self.missing]))
        for i, element in enumerate(elements):
            there = "missing" if element in self.missing else self.files.get(element, "observed")
            chance, looks = "", ""
            if perceived:
                chance = f"{perceived.missing[i]:.2f}"
                if element in perceived.identity:
                    looks = "{} ({:.2f})".format(*perceived.looks_like(element))
                    if self.task == "brain" and perceived.looks_like(element)[0] != element:
                        looks = f"[red]{looks}[/red]"
            table.add_row(element, escape(there), chance, looks)
        lines: list[RenderableType] = [table]
        if perceived:
            chances = ", ".join(f"{c}: {p:.2f}" for c, p in enumerate(perceived.count, start=1))
            lines.append(f"missing: {len(self.missing)} by the files; P(number missing) {chances}")
        for finding in self.findings:
            style = "red" if finding.flag else "yellow"
            lines.append(Text(f"{'!' if finding.flag else '-'} {finding.text}", style=style))
        if not self.flagged:
            lines.append(Text("files and images agree", style="green"))
        return Group(*lines)


def examine(volumes: Mapping[str, Volume], files: Mapping[str, str], *, task: str) -> list[Finding]:
    """What the voxels show without a network: constant and non-finite volumes, blank planes.

    Blank planes at the ends of a brain volume are background; those between planes that hold an image are
    flagged. Blank slices of a cardiac stack are how a file says that they are missing, so they are not looked
    for here.
    """
    from copedit_rt.images.study import blank_slices

    found = []
    for name, volume in volumes.items():
        data, file = np.asarray(volume.data), files.get(name, name)
        finite = np.isfinite(data)
        if not finite.any() or np.ptp(data[finite]) == 0:
            found.append(Finding("constant", f"{file} is constant: it holds no image", element=name))
            continue
        if task == "cardiac":
            continue
        if bad := data.size - int(finite.sum()):
            found.append(Finding("non-finite", f"{file} has {bad} NaN or infinite voxels", element=name))
        for axis in range(3):
            blank = blank_slices(data, axis)
            full = np.setdiff1d(np.arange(data.shape[axis]), blank)
            inner = [i for i in blank if full.min() < i < full.max()]
            if inner:
                text = f"{file} is blank inside the image at {'ijk'[axis]} = {_runs(inner)}"
                found.append(Finding("blank", text, element=name))
    return found


def contradictions(perception: Perception, files: Mapping[str, str], *, task: str) -> list[Finding]:
    """Where the network disagrees with the files: what each image is, how many are missing, and which.

    files: shown name per observed element. The observed elements are those in `perception.identity`.
    """
    found = []
    for name in perception.identity:
        looks, chance = perception.looks_like(name)
        if looks == name or chance < 0.5:  # unsure is not a contradiction
            continue
        text = f"{files.get(name, name)} is named {name} but looks like {looks} ({chance:.2f})"
        if task == "cardiac":
            text = f"{name} looks like {looks} ({chance:.2f}): do the slices run from apex to base?"
        found.append(Finding("identity", text, element=name))
    missing = tuple(e for e in perception.elements if e not in perception.identity)
    if not missing:  # the heads know only studies with something missing
        return found
    if perception.count_missing != len(missing):
        chance = perception.count[perception.count_missing - 1]
        says = f"the files say {len(missing)} missing"
        text = f"{says}, the images look like {perception.count_missing} ({chance:.2f})"
        found.append(Finding("count", text))
    for name, chance in zip(perception.elements, perception.missing, strict=True):
        if (chance > 0.5) != (name in missing):
            says = "missing" if name in missing else "present"
            text = f"{name} is {says} by the files, but P(missing) is {chance:.2f} by the images"
            found.append(Finding("missing", text, element=name))
    return found


def _runs(numbers: Iterable[int]) -> str:
    """3, 4, 5, 9 as "3-5, 9"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
