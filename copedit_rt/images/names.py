"""What the names of files say: the modality, the subject, the data set's way of spelling; and how outputs are named."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from copedit_rt.errors import CopeditError

MODALITIES = ("t1", "t1ce", "t2", "flair", "pd")  # also the order in which a study's files are taken
STACK = "sax"  # the one volume of a cardiac study
# What a modality may be called at the end of a name; the longest match counts ("t2_flair" before "flair").
_SPELLINGS = {
    "t1": r"t1[nw]?",
    "t1ce": r"t1w?[-_]?(?:ce|c|gd|post|contrast)",
    "t2": r"t2w?",
    "flair": r"(?:t2[-_])?flair|t2flair|t2f",
    "pd": r"pdw?",
}
_MODALITY = "|".join(f"(?P<{name}>{pattern})" for name, pattern in _SPELLINGS.items())
_AT_END = re.compile(rf"(?:^|(?<=[-_. ]))(?:{_MODALITY})$", re.I)
INSIDE = re.compile(rf"(?:^|[-_. ])(?:{_MODALITY})(?=[-_. ])", re.I)
OTHER = re.compile(
    r"(?:^|[-_. ])"
    r"(t1map|t2map|t1rho|t2star|t2s|inplanet2|swi|gre|qsm|dwi|dti|adc|bold|asl|cbf|mra|tof|stir|ct|pet)"
    r"(?:[-_. ]\d+)?$",
    re.I,
)
LABELS = re.compile(
    r"(?:^|[-_. ])(?:gt|[dp]?seg|probseg|segmentation|(?:brain)?mask|lesions?|wmh|labels?|roi|manual)\d*$"
    r"|^(?:label|seg|mask)s?[-_. ]",
    re.I,
)
FRAME = re.compile(r"[-_](?:frame\d+|E[DS])$", re.I)  # ACDC, UKBB: a stack at one moment of the heart's cycle
OTHER_VIEW = re.compile(r"^(?:la(?:_\dch)?|ao|lvot)(?:_E[DS])?$", re.I)  # UKBB
MSCMR = re.compile(r"^patient\d+_(?:C0|LGE|DE|T2)$", re.I)  # its T2 is a heart's
_BIDS = re.compile(r"^(?P<entities>sub-[^_]+(?:_[a-zA-Z0-9]+-[^_]+)*)_(?P<suffix>[a-zA-Z0-9]+)$")
# How data sets spell their modalities; outputs follow the first that agrees best with the inputs.
STYLES = (
    {"t1": "t1", "t1ce": "t1ce", "t2": "t2", "flair": "flair", "pd": "pd"},  # BraTS to 2021
    {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f", "pd": "pdw"},  # BraTS from 2023
    {"t1": "T1", "t1ce": "T1ce", "t2": "T2", "flair": "FLAIR", "pd": "PD"},  # IXI
    {"t1": "T1", "t1ce": "T1GD", "t2": "T2", "flair": "FLAIR", "pd": "PD"},  # UPENN-GBM
    {"t1": "T1", "t1ce": "T1c", "t2": "T2", "flair": "FLAIR", "pd": "PD"},  # UCSF-PDGM
    {"t1": "T1w", "t1ce": "T1ce", "t2": "T2w", "flair": "FLAIR", "pd": "PDw"},
)


def modality(name: str) -> str:
    """The modality that a name stands for in any spelling, e.g. "T1Gd" -> "t1ce"; CopeditError if none."""
    match = _AT_END.fullmatch(name.strip())
    if not match:
        raise CopeditError(f"unknown modality {name!r}; known modalities are {', '.join(MODALITIES)}")
    return str(match.lastgroup)


@dataclass(frozen=True)
class Naming:
    """How a study's files are named: head + spelling of the element, in subfolder of the output folder."""

    head: str
    spelling: Mapping[str, str]
    subfolder: Path = Path()

    def path(self, folder: Path, element: str, suffix: str = "", ending: str = ".nii.gz") -> Path:
        """Where an element's output goes below an output folder."""
        return Path(folder) / self.subfolder / f"{self.head}{self.spelling[element]}{suffix}{ending}"


@dataclass(frozen=True)
class Name:
    """What one file's name says."""

    path: Path
    element: str
    head: str
    spelling: str
    folder: Path  # where the study's other files are looked for
    tail: str | None = None  # BIDS: entities after the contrast agent's


def stem_of(path: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.I)


def without_frame(stem: str) -> str:
    """A stack's name without the moment of the heart's cycle: patient001_frame01 -> patient001, sa_ED -> sa."""
    return FRAME.sub("", stem)


def is_nifti(path: Path) -> bool:
    return bool(re.search(r"\.nii(\.gz)?$", path.name, re.I))


def parse(path: Path) -> Name | None:
    """The modality in a file's name, or in the name of its folder; None if there is none."""
    stem, parent = stem_of(path), path.parent
    if bids := _BIDS.match(stem):
        match = _AT_END.fullmatch(bids["suffix"])
        if not match:
            return None
        entities = dict(part.split("-", 1) for part in bids["entities"].split("_"))
        element = "t1ce" if match.lastgroup == "t1" and "ce" in entities else str(match.lastgroup)
        head = "".join(f"{key}-{entities[key]}_" for key in ("sub", "ses") if key in entities)
        tail = f"space-{entities['space']}_" if "space" in entities else ""
        return Name(path, element, head, bids["suffix"], parent, tail)
    by_folder = _AT_END.search(parent.name)
    if match := _AT_END.search(stem):
        # IXI: one folder a modality, side by side
        beside = by_folder is not None and by_folder.lastgroup == match.lastgroup
        folder = parent.parent if beside else parent
        return Name(path, str(match.lastgroup), stem[: match.start()], match[0], folder)
    if by_folder and not OTHER.search(stem) and not INSIDE.search(stem):
        return Name(path, str(by_folder.lastgroup), f"{stem}_", by_folder[0], parent.parent)
    return None


def naming_of(names: Sequence[Name], subfolder: Path) -> Naming:
    first = names[0]
    if first.tail is not None:  # BIDS
        tail = first.tail
        agent = next((m[1] for n in names if (m := re.search(r"_ce-([^_]+)", n.path.name))), "gadolinium")
        spelling = {"t1": "T1w", "t1ce": "T1w", "t2": "T2w", "flair": "FLAIR", "pd": "PDw"}
        spelling = {e: f"ce-{agent}_{tail}{s}" if e == "t1ce" else tail + s for e, s in spelling.items()}
        return Naming(first.head, spelling, subfolder)
    style = max(STYLES, key=lambda style: sum(style[n.element] == n.spelling for n in names))
    return Naming(first.head, style, subfolder)
