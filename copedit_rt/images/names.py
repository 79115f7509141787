"""What the names of files say: the modality, the subject, the data set's way of spelling; and how outputs are named.

A name is read word by word from its end. Every word after the modality has to be known, so that T1_map, T1_FLAIR or
T2_star are never taken for what they begin with: what is not understood is said, not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from copedit_rt.errors import CopeditError
from copedit_rt.files import read_json
from copedit_rt.images.bids import DERIVED

# Whose spelling each column of `written` below is; outputs follow the column that agrees best with the inputs.
DATA_SETS = ("BraTS to 2021", "BraTS from 2023", "IXI", "UPENN-GBM", "UCSF-PDGM", "BIDS words in other names")


@dataclass(frozen=True)
class Modality:
    """A modality of the brain, and all that the program knows of it.

    word: what a word of a file's name looks like that means it (a regular expression, whatever the case).
    written: its spelling in outputs, a column for each of DATA_SETS, each of which `word` matches. bids: its suffix in
    BIDS, likewise. series: what words of a DICOM series' description mean it (a regular expression, lower case).
    enhanced: the modality that this one is after contrast agent. beside: modalities whose word may stand beside.
    """

    name: str
    about: str
    word: str
    written: tuple[str, ...]
    bids: str
    series: str = ""
    enhanced: str = ""
    beside: tuple[str, ...] = ()


# One row a modality; the order is that in which a study's files are taken: the first is the reference.
TABLE = (
    Modality(
        "t1",
        "T1",
        r"t1(?:n|wi?)?",
        ("t1", "t1n", "T1", "T1", "T1", "T1w"),
        "T1w",
        r"s?[23]?d?t1w?i?(?:tse|tfe|ffe|fse|se|mprage|mpr|spc|space|vibe|bravo|fl2d|fl3d)?|t1weighted|mprage|memprage"
        r"|me-?mprage|mp-?rage|bravo|[ef]?spgr|fspgr|irfspgr|[23]dtfe|mpr",
    ),
    Modality(
        "t1ce",
        "T1 with contrast agent",
        r"t1(?:wi?)?\+?(?:ce|c|gd|gad|gado|gadolinium|km|post|contrast|enhanced)",
        ("t1ce", "t1c", "T1ce", "T1GD", "T1c", "T1ce"),
        "T1w",
        enhanced="t1",
    ),
    Modality(
        "t2",
        "T2",
        r"t2(?:wi?)?",
        ("t2", "t2w", "T2", "T2", "T2", "T2w"),
        "T2w",
        r"s?[23]?d?t2w?i?(?:tse|fse|spc|space|cube|blade|frfse|propeller|haste)?|t2weighted",
    ),
    Modality(
        "flair",
        "FLAIR",
        r"(?:t2)?flair|t2f",
        ("flair", "t2f", *["FLAIR"] * 4),
        "FLAIR",
        r"s?[23]?d?(?:t2w?)?flair|t2f|dark-?fl(?:uid)?|darkfluid|fluid|da-?fl|[23]dflair",
        beside=("t2",),
    ),
    Modality(
        "pd",
        "proton density",
        r"pd(?:wi?)?",
        ("pd", "pdw", "PD", "PD", "PD", "PDw"),
        "PDw",
        r"pdw?i?(?:tse|fse)?|proton|protondensity|dp",
    ),
)
MODALITIES = tuple(row.name for row in TABLE)
STYLES = tuple({row.name: row.written[i] for row in TABLE} for i in range(len(DATA_SETS)))
_ROWS = {row.name: row for row in TABLE}
_ENHANCED = {row.enhanced: row.name for row in TABLE if row.enhanced}
_WORD = re.compile("|".join(f"(?P<{row.name}>{row.word})" for row in TABLE), re.I)


def _words(text: str) -> re.Pattern[str]:
    return re.compile("|".join(text.split()), re.I)


# Words that do not change which modality an image is. They may stand after it; those of a protocol also before it.
_PROTOCOL = _words(
    r"[23]d ax axi axial tra trans transversal transverse sag sagittal cor coronal mprage space cube vista tse fse tfe"
    r" fspgr spgr bravo vibe"
)
_PROCESSED = _words(
    r"brain bet stripped skullstripped ss n4 bfc biascorr biascorrected corrected restored? acpc dc reg registered"
    r" coreg coregistered resampled reorient reoriented norm normalized std mni mni152 defaced? anon crop cropped"
    r" denoised preproc raw orig eq tilt scan image img vol volume hires highres lowres \d+(?:mm)? run\d*"
    r" mpr\d* spc\d* iso se blade propeller haste fs fatsat p\d [137]t weighted w wi mri mr"
)
_AGENT = _words(r"ce c \+c gd gad gado gadolinium km contrast enhanced post postcontrast postgd")
_PLAIN = _words(r"pre precontrast native nativ noncontrast unenhanced")
# C- or -C: without the agent.
MINUS = re.compile(r"(?<![a-z])(?:c|gd|gad|km|mdc)-(?![a-z0-9])|[ _]-(?:c|gd|gad|km|mdc)(?![a-z0-9+])", re.I)
# Words of images that are none of the table's, though they may name one: T2 star, T1 map.
_OTHER = _words(
    r"t1map t2map map t1rho rho t2star t2starw t2s star inplanet2 gre ffe swi swan qsm megre dwi dti adc fa md trac[ew]"
    r" b\d+ bold epi sbref asl cbf cbv pwi dsc dce perf perfusion m0scan mra mrv tof angio stir ct cbct pet fdg"
    r" phase\d* magnitude\d* phasediff fieldmap fmap localizer localiser scout survey"
)
LABELS = re.compile(
    r"(?:^|[-_. ])(?:gt|[dp]?seg|probseg|segmentation|(?:brain)?mask(?:[-_]fs)?|defacemask|lesions?|wmh|labels?|roi"
    r"|manual|aseg|aparc|aparc\+aseg|wmparc|ribbon|parcellation|[lr]v|myo|pve(?:seg)?(?:[-_]\d)?)\d*$"
    r"|^(?:label|seg|mask)s?[-_. ]",
    re.I,
)
FRAME = re.compile(r"[-_](?:frame\d+|E[DS])$", re.I)  # ACDC, UKBB: a stack at one moment of the heart's cycle
OVER_TIME = re.compile(r"_4d$|^\d{3}_sa_cine$", re.I)  # ACDC, M&Ms-2: its frames lie beside it
OTHER_VIEW = re.compile(r"^(?:la(?:_\dch)?|ao|lvot)(?:_E[DS])?$|^\d{3}_la_(?:cine|E[DS])$", re.I)  # UKBB, M&Ms-2
MSCMR = re.compile(r"^(patient\d+)_(?:C0|LGE|DE)$", re.I)
_HEARTS = re.compile(
    r"^patient\d{3}_(?:frame\d+|4d|E[DS])$"  # ACDC
    r"|^patient\d+_(?:C0|LGE|DE)$"  # MSCMR
    r"|^sa(?:_E[DS])?$"  # UKBB
    r"|^[A-Z]\d[A-Z]\d[A-Z]\d_sa(?:_E[DS])?$|^\d{3}_sa_(?:cine|E[DS])$"  # M&Ms, M&Ms-2
    r"|^SC-(?:HF-I|HF-NI|HYP|N)-\d+(?:_E[DS])?$"  # Sunnybrook
    r"|^MES(?:A[-_]?)?\d+(?:_E[DS])?$"  # MESA
    r"|(?:^|[-_. ])(?:sax|short[-_ ]?axis|heart|cardiac)\d*(?:$|[-_. ])",
    re.I,
)
_CHANNEL = re.compile(r"^(?P<head>.*_)?(?P<number>0\d{3})$")  # nnU-Net; 2021 is a year
_BIDS = re.compile(r"^(?P<entities>sub-[^_]+(?:_[a-zA-Z0-9]+-[^_]+)*)_(?P<suffix>[a-zA-Z0-9]+)$")
NIFTI = re.compile(r"\.nii(\.gz)?$", re.I)
FOREIGN = re.compile(r"\.(?:mgz|mgh|nrrd|nhdr|mha|mhd|mnc|hdr|img(?:\.gz)?)$", re.I)  # images, but not NIfTI files
PLAIN = "plain"  # what chooses a file without any mark


def meant(named: Set[str]) -> Set[str]:
    """Of what words name, all but the modalities whose word stands beside another's: T2 FLAIR is FLAIR."""
    return named - {other for name in named & _ROWS.keys() for other in _ROWS[name].beside}


def modality(name: str) -> str:
    """The modality that a name stands for in any spelling, e.g. "T1Gd" -> "t1ce"; CopeditError if none."""
    found = _read(name.strip())
    if not found or found.head:
        raise CopeditError(f"unknown modality {name!r}; known modalities are {', '.join(MODALITIES)}")
    return found.element


def targets(named: str | Sequence[str] | None) -> list[str] | None:
    """The modalities of a target, "all", "t1,flair" or names; None for all. CopeditError for unknown ones and none."""
    if isinstance(named, str):
        named = None if named.strip().lower() == "all" else [part for part in named.split(",") if part.strip()]
    if named is None:
        return None
    if not (found := [modality(name) for name in named]):
        raise CopeditError("target: it names no modality; leave it out to have all that is missing synthesised")
    return found


@dataclass(frozen=True)
class Naming:
    """How a study's files are named: head + spelling of the element, in subfolder of the output folder.

    derived: the outputs are a derivative of a BIDS data set.
    """

    head: str
    spelling: Mapping[str, str]
    subfolder: Path = Path()
    derived: bool = False

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
    marks: frozenset[str] = frozenset()  # what tells it from other files of its modality: run-01, brain
    doubtful: bool = False  # `post_T1`: after contrast agent, or T1 of a later visit?
    channels: Mapping[str, str] | None = None  # nnU-Net: {modality: number}


@dataclass(frozen=True)
class _Read:
    element: str
    head: str
    spelling: str
    marks: frozenset[str]
    doubtful: bool


def _read(stem: str) -> _Read | None:
    """The modality that a name ends in, with words that change nothing around it; None where there is doubt."""
    words = list(re.finditer(r"[^-_. ]+", stem))
    last = len(words) - 1
    while last >= 0 and not _WORD.fullmatch(words[last][0]):
        if not any(p.fullmatch(words[last][0]) for p in (_PROTOCOL, _PROCESSED, _AGENT, _PLAIN)):
            return None
        last -= 1
    if last < 0:
        return None
    first = last
    while first > 0 and (_WORD.fullmatch(words[first - 1][0]) or _PROTOCOL.fullmatch(words[first - 1][0])):
        first -= 1
    named = [m for word in words[first : last + 1] if (m := _WORD.fullmatch(word[0]))]
    elements = meant({str(m.lastgroup) for m in named})
    before = words[first - 1][0] if first else ""
    if len(elements) != 1 or (first > 1 and _OTHER.fullmatch(before)) or MINUS.search(stem, words[first].start()):
        return None
    (element,) = elements
    after = [word[0] for word in words[last + 1 :]]
    agent = any(_AGENT.fullmatch(word) for word in after) and not any(_PLAIN.fullmatch(word) for word in after)
    marks = frozenset(w.lower() for w in after if not (_AGENT.fullmatch(w) or _PLAIN.fullmatch(w)))
    doubtful = element in _ENHANCED and bool(_AGENT.fullmatch(before))
    start = next(w.start() for w in words[first:] if _WORD.fullmatch(w[0]))
    end = words[last + 1].end() if agent and _AGENT.fullmatch(after[0]) else words[last].end()
    element = _ENHANCED.get(element, element) if agent else element
    return _Read(element, stem[: words[first].start()], stem[start:end], marks, doubtful)


def stem_of(path: Path) -> str:
    return FOREIGN.sub("", NIFTI.sub("", path.name))


def without_frame(stem: str) -> str:
    """A stack's name without the moment of the heart's cycle: patient001_frame01 -> patient001, sa_ED -> sa."""
    return FRAME.sub("", stem)


def is_nifti(path: Path) -> bool:
    return bool(NIFTI.search(path.name))


def is_heart(stem: str) -> bool:
    """Whether a name is one of ACDC, MSCMR, UKBB, M&Ms, Sunnybrook or MESA, or says heart, cardiac, sax, short-axis."""
    return bool(_HEARTS.search(stem))


def parse(path: Path, *, by_folder: bool = False) -> Name | None:
    """The modality in a file's name; by_folder: or in the name of its folder, which then holds one modality.

    None if there is none, or one that is not certain.
    """
    stem, parent = stem_of(path), path.parent
    if bids := _BIDS.match(stem):
        found = _read(bids["suffix"])
        if not found:
            return None
        entities = dict(part.split("-", 1) for part in bids["entities"].split("_"))
        element = _ENHANCED.get(found.element, found.element) if "ce" in entities else found.element
        if not _certain(element, entities):
            return None
        head = "".join(f"{key}-{entities[key]}_" for key in ("sub", "ses") if key in entities)
        tail = f"space-{entities['space']}_" if "space" in entities else ""
        marks = {f"{k}-{v}".lower() for k, v in entities.items() if k not in ("sub", "ses", "ce", "space")}
        return Name(path, element, head, bids["suffix"], parent, tail, frozenset(marks))
    folder = _read(parent.name) if by_folder else None
    if found := _read(stem):
        # IXI: one folder a modality, side by side
        beside = parent.parent if folder and folder.element == found.element else parent
        return Name(path, found.element, found.head, found.spelling, beside, None, found.marks, found.doubtful)
    if folder and not other(stem) and not mentions(stem):
        return Name(path, folder.element, f"{stem}_", folder.spelling, parent.parent)
    return None


def _certain(element: str, entities: Mapping[str, str]) -> bool:
    """Whether BIDS entities leave no doubt: not acq-gd_T1w, acq-flair_T2w or part-phase_T1w."""
    free = " ".join(entities.get(key, "") for key in ("acq", "rec", "desc"))
    if element in _ENHANCED and re.search(r"gd|gad|contrast|enhance|post|\b(?:km|ce?)\b", free, re.I):
        return False
    named = {str(m.lastgroup) for word in free.split() if (m := _WORD.fullmatch(word))}
    return meant(named | {element}) == {element} and entities.get("part", "mag") == "mag"


def folder_modality(folder: Path) -> tuple[str, str] | None:
    """(modality, what stands before it) in a folder's name, as in IXI-T1."""
    found = _read(folder.name)
    return (found.element, found.head) if found else None


def mentions(stem: str) -> str | None:
    """A modality that a name holds somewhere."""
    hits = [m for word in re.split(r"[-_. ]", stem) if (m := _WORD.fullmatch(word))]
    return str(hits[-1].lastgroup) if hits else None


def other(stem: str) -> str | None:
    """The word of a name that says it is another kind of image than the table's; after the modality if it has one."""
    words = re.split(r"[-_. ]+", stem)
    start = max((i + 1 for i, word in enumerate(words) if _WORD.fullmatch(word)), default=0)
    return next((word for word in words[start:] if _OTHER.fullmatch(word)), None)


def nameless(stem: str) -> bool:
    """Whether a name begins with what it shows, and not with whose it is."""
    first = re.split(r"[-_. ]+", stem)[0]
    return bool(_WORD.fullmatch(first) or _PROTOCOL.fullmatch(first))


def channel(path: Path) -> Name | None:
    """nnU-Net: the modality of `case_0002.nii.gz` by the channel_names of a dataset.json beside it or one folder up.

    None for another name; CopeditError, a reason, where the mapping is not there.
    """
    match = _CHANNEL.match(stem_of(path))
    if not match or not match["head"]:
        return None
    channels = next((found for folder in (path.parent, path.parent.parent) if (found := _channels(folder))), {})
    number = match["number"]
    if number not in channels:
        raise CopeditError(
            f"its name ends in a channel, {number}, and no dataset.json beside it or one folder up says in its "
            f'channel_names which modality that is; write one ({{"channel_names": {{"0": "T1"}}}}) or give '
            f"the files by --file t1=FILE and so on"
        )
    spelling = {element: number for number, element in channels.items()}
    return Name(path, channels[number], match["head"], number, path.parent, channels=spelling)


def _channels(folder: Path) -> dict[str, str]:
    """{"0000": modality} of a folder's dataset.json; nothing where it is not there or knows no modality."""
    try:
        read = read_json(folder / "dataset.json")
        names = read.get("channel_names") or read.get("modality") or {}
        found = {f"{int(key):04d}": _read(str(name)) for key, name in names.items()}
    except (OSError, ValueError, AttributeError):
        return {}
    return {number: name.element for number, name in found.items() if name and not name.head}


def naming_of(names: Sequence[Name], subfolder: Path, derived: bool = False) -> Naming:
    """How a brain's outputs are named, by the names of the chosen files; of BIDS with their run, if it is one."""
    first = names[0]
    if first.tail is not None:  # BIDS
        runs = {mark for name in names for mark in name.marks if mark.startswith("run-")}
        tail = f"{''.join(runs)}_" * (len(runs) == 1) + first.tail + DERIVED * derived
        agent = next((m[1] for n in names if (m := re.search(r"_ce-([^_]+)", n.path.name))), "gadolinium")
        spelling = {row.name: f"ce-{agent}_" * bool(row.enhanced) + tail + row.bids for row in TABLE}
        return Naming(first.head, spelling, subfolder, derived)
    style = max(STYLES, key=lambda style: sum(style[n.element] == n.spelling for n in names))
    return Naming(first.head, {**style, **(first.channels or {})}, subfolder)


def choose(names: Sequence[Name], select: Iterable[str]) -> list[Name]:
    """Of several files of one modality those with most of the selected marks, then with the fewest others."""
    wanted = {mark.lower() for mark in select}
    carried = {name.path: len(wanted & (name.marks or {PLAIN})) for name in names}
    most = max(carried.values())
    if len(names) < 2 or not most:
        return list(names)
    best = [name for name in names if carried[name.path] == most]
    fewest = min(len(name.marks) for name in best)
    return [name for name in best if len(name.marks) == fewest]
