"""What the network perceives in a study.

The network reads images, not names. From the observed elements alone it states how many are missing, which,
and, one image at a time, what each looks like; the three opinions are made one (`_agreed`). `copedit_rt.inspection`
sets this beside what the files say. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from copedit_rt.task import Task

Array = NDArray[np.float64]
DOUBT = 0.05  # share of the times that a head is taken to guess
TWICE = 0.1  # how likely two images of one element are, beside images that are all different


@dataclass(frozen=True)
class Perception:
    """Probabilities from the prompt heads of one study with m elements.

    count: P(c elements are missing), c = 1..m-1; sums to 1. None missing is not a class: it means little
    then.
    missing: P(element i is missing), i = 0..m-1.
    identity: per observed element, by its name: P(that one image is element i), i = 0..m-1; sums to 1.
    elements: names of the m elements. unlike: a sentence about each image that is unlike what the model was trained on.
    seen_only: what the network was trained on, where that was phantoms alone and the rest of the model was not.
    """

    count: list[float]
    missing: list[float]
    identity: dict[str, list[float]]
    elements: tuple[str, ...]
    unlike: tuple[str, ...] = ()
    seen_only: str = ""

    @classmethod
    def from_logits(
        cls, task: Task, elements: Sequence[str], count: ArrayLike, position: ArrayLike, alone: Mapping[str, ArrayLike]
    ) -> Perception:
        """count [m-1] and position [m]: logits of the heads over all observed elements; alone: per observed
        element the position logits [m] when it is the only one given. task: says which of them to trust more.

        With one image given exactly one element is present. The position logits l are log odds of "missing",
        so P(only i present) is proportional to prod_j p_j * (1 - p_i) / p_i, that is to exp(-l_i): a softmax
        of -l. Number and positions are what the three agree on, see `_agreed`.
        """
        missing = 0.5 * (1 + np.tanh(np.asarray(position, dtype=np.float64) / 2))
        identity = {name: _softmax(-np.asarray(logits, dtype=np.float64)) for name, logits in alone.items()}
        number, missing = _agreed(
            np.array(_softmax(count)), missing, [np.array(p) for p in identity.values()], *task.trust
        )
        return cls(number.tolist(), missing.tolist(), identity, tuple(elements))

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


def _agreed(count: Array, missing: Array, identity: Sequence[Array], heads: float, alone: float) -> tuple[Array, Array]:
    """P(number missing) [m-1] and P(missing) [m] from those of the two heads and what each image looks like [m].

    Each says how likely a set of elements is to be what is there, and their product is taken (a logarithmic opinion
    pool): the two heads to the power `heads`, and to the power `alone` the chance that the images look like this set
    together, of whatever each is by itself. A set cannot have more elements than there are images, and seldom has
    fewer (`TWICE`). Number has no class for none missing; there that of one is taken.
    """
    if not identity:
        return count, missing
    m, (count, *single) = len(missing), ((1 - DOUBT) * p + DOUBT / len(p) for p in (count, *identity))
    every = np.arange(2**m)
    there = (every[:, None] >> np.arange(m) & 1).astype(bool)  # [sets, m]
    together = (every == 0).astype(np.float64)
    for chances in single:
        grown = np.zeros_like(together)
        for i, p in enumerate(chances):
            np.add.at(grown, every | 1 << i, p * together)
        together = grown
    together *= np.where(there.sum(1) < len(single), TWICE, 1)
    lacking = m - there.sum(1)
    own = (1 - DOUBT) * missing + DOUBT / 2
    whole = count[np.clip(lacking, 1, m - 1) - 1] * np.where(there, 1 - own, own).prod(1)
    chance = whole**heads * together**alone
    chance /= chance.sum()
    number = np.bincount(lacking, chance, m + 1)[1:m]
    return number / number.sum(), chance @ ~there


def _softmax(logits: ArrayLike) -> list[float]:
    values = np.asarray(logits, dtype=np.float64)
    exp = np.exp(values - values.max())
    return (exp / exp.sum()).tolist()
