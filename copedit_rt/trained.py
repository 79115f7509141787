"""What a model was trained on, and whether a study's grey values are like that. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from copedit_rt.errors import CopeditError
from copedit_rt.files import write_atomically
from copedit_rt.prior import QUANTILES, shown

TRAINING = "training.json"
RANGE = (0.5, 99.5)  # percent of the training images whose quantiles count as known
STRANGE = 2  # so many quantiles of an image outside of it are worth a remark: one alone is often chance

Images = NDArray[np.float32]


@dataclass(frozen=True)
class TrainedOn:
    """words: what the training images were, as a part of a sentence. known: per element (of hearts for all slabs
    together, "stack") the range of each of `prior.QUANTILES` of what an image shows. perception: what the network that
    perceives was trained on, where that was phantoms alone and the rest of the model was not."""

    words: str
    known: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    perception: str = ""

    @classmethod
    def of(
        cls, words: str, elements: Sequence[str], subjects: Iterable[Images], perception: str = ""
    ) -> TrainedOn:
        """Of training images [m, 1, H, W, D] each, on the model's grid."""
        rows: dict[str, list[NDArray]] = {}
        for images in subjects:
            for name, image in _named(elements, images, np.ones(len(elements), bool)).items():
                rows.setdefault(name, []).append(shown(image))
        known = {name: np.percentile(np.stack(row), RANGE, axis=0).T.round(4).tolist() for name, row in rows.items()}
        return cls(words, known, perception)

    @classmethod
    def load(cls, folder: Path) -> TrainedOn | None:
        """Of a model folder; None where it does not say. Raises CopeditError for a damaged file."""
        path = folder / TRAINING
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            known = {str(k): [[float(low), float(high)] for low, high in v] for k, v in data["known"].items()}
            if any(len(ranges) != len(QUANTILES) for ranges in known.values()):
                raise ValueError(f"{len(QUANTILES)} ranges are needed")
            return cls(str(data["words"]), known, str(data.get("perception", "")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CopeditError(f"{path}: not what a model was trained on ({error}); copy the model again") from error

    def save(self, folder: Path) -> None:
        """Into a model folder."""
        data = {"words": self.words, "perception": self.perception, "quantiles": QUANTILES, "known": self.known}
        write_atomically(folder / TRAINING, (json.dumps(data, indent=1) + "\n").encode())

    def remarks(self, elements: Sequence[str], images: Images, observed: NDArray[np.bool_]) -> tuple[str, ...]:
        """A sentence about each observed image that is unlike training. images [m, 1, H, W, D] on the model's grid."""
        found = []
        for name, image in _named(elements, images, observed).items():
            own = shown(image)
            ranges = np.array(self.known.get(name, np.stack((own, own), 1)))
            away = np.maximum(ranges[:, 0] - own, own - ranges[:, 1])
            if (away > 0).sum() >= STRANGE:
                i = int(away.argmax())
                found.append(
                    f"{name} is unlike what the model was trained on: {QUANTILES[i]:.0%} of its grey values lie below "
                    f"{own[i]:.2f} of its range, in training {ranges[i, 0]:.2f} to {ranges[i, 1]:.2f}; look closely at "
                    f"what was made of it"
                )
        return tuple(found)


def _named(elements: Sequence[str], images: Images, observed: NDArray[np.bool_]) -> dict[str, Images]:
    there = [(name, image) for name, image, seen in zip(elements, images, observed, strict=True) if seen]
    if elements[0].startswith("slab"):
        return {"stack": np.stack([image for _, image in there])} if there else {}
    return dict(there)
