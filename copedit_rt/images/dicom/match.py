"""Which modality a series is: by the words of its description, or else by its echo, repetition and inversion times.

Descriptions are free text of many hospitals and languages. A series that holds a word of what is no plain image, such
as diffusion, or words of two modalities, is left out with the reason; whoever knows better names it by hand
(`--file t1=SERIES`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from itertools import pairwise

from copedit_rt.images.dicom.headers import Header
from copedit_rt.images.dicom.series import Series
from copedit_rt.images.names import MINUS, TABLE, meant
from copedit_rt.task import STACK

SYNTHETIC, BY_DESCRIPTION = "synthetic", "by its description"
# What is left out, and what it is called. Words are compared whole, in lower case; a hyphen or blank may be left out.
_LEFT_OUT = (
    ("a localizer", "loc localizer localiser scout survey aahscout aaheadscout topogram 3plane threeplane 3pl plan"),
    ("a calibration", "cal calibration asset asset-cal ref refscan senseref prescan b0map fieldmap fmap shim b1map"),
    ("diffusion", r"dwi dti diff diffusion adc eadc trace tracew trace-weighted fa colfa ivim resolve b\d{3,4} ddc"),
    ("perfusion", "perf perfusion pwi dsc dce asl pasl pcasl cbf cbv rcbf rcbv mtt ttp tmax gbp pbp ktrans relcbf"),
    ("susceptibility", r"swi swan qsm mip minip mnip pha phase t2star t2\*.* star hemo medic venobold gre ffe megre"),
    ("an angiography", "tof angio angiography mra mrv pca venogram venography"),
    ("a map", r"map maps mapping t1map t2map molli shmolli t1rho rho"),
    ("functional", "bold fmri epi rest resting task sbref"),
    ("spectroscopy", "svs csi mrs spectro spectroscopy"),
    ("inversion without the fluid's", "stir"),
    ("a subtraction", "sub subtract subtraction subtraktion subtracted"),
    ("a part of a Dixon image", "water wasser fat fett inphase opposed oppphase outphase"),
    ("a spine", "spine wirbelsaeule cspine tspine lspine hws bws lws cervical lumbar thoracic"),
    ("a report or picture", "report phoenix phoenixzipreport screenshot screensave secondary snapshot mosaic"),
    ("not the short axis", r"[234]ch [234]chamber lax longaxis lvot rvot aorta"),
)
_INVERSION = r"tirm?|irtse"  # with a long time the fluid's, with a short one the fat's
_DARK = r"dark|csf|suppress\w*"  # of a T2 perhaps the fluid, as of FLAIR
_WORDS = {row.name: row.series for row in TABLE if row.series} | {
    STACK: r"sax|shortaxis|shax|kurzachse|kurzeachse|sacine|cinesa|sastack",
}
_AGENT = (
    r"\+?(?:w/?|c/)?(?:c|ce|gd|gad[a-z]*|dotarem|prohance|multihance|magnevist|km|mdc|post|postcontrast|postgad|postgd"
    r"|contrast|kontrast|contraste|enhanced|cont)\+?"
)
_WITHOUT = (
    r"pre|precontrast|pregad|pregd|native?|nativ|unenhanced|without|w/?o|wout|ohne|sans|senza|zonder|utan|uden|bez"
    r"|plain"
)
_PLAIN = rf"{_WITHOUT}|(?!sinc$)(?:no|non|minus|sin|sem|s/)(?:{_AGENT})"  # a sinc is a pulse
_SLASH = re.compile(r"(?<!\b[wcs])/")  # that parts words: not in w/o or c/contraste
_EITHER = rf"(?:{_AGENT}|w|with|mit|con|com|avec)", rf"(?:{_WITHOUT}|sin|sem)"
_AND = r"(?:\s*[/&+]\s*|\s+(?:and|und|et|y|e)\s+)"
_BOTH = re.compile(  # pre/post, c+/c-
    "|".join(rf"\b{one}{_AND}{other}\b(?!(?<=\bc)-)" for one, other in (_EITHER, _EITHER[::-1]))
    + r"|\bc\+\s*/\s*c-|\bc-\s*/\s*c\+"
)
_T1_AGENT = r"s?[23]?d?t1w?\+?(?:ce|c|gd|gad|gado|km|post|\+)"
_FAT = re.compile(r"(?:fat|fett)[-_ ]?(?:sat|sup|saettig|suppr)[^\W_]*|water[-_ ]?(?:exc|sel)[^\W_]*", re.I)
_CHEST = ("HEART", "CARDIAC", "CHEST", "THORAX")  # body parts
_HEAD = ("HEAD", "BRAIN", "SKULL", "HEADNECK")
_SPLIT = re.compile(r"[^a-z0-9+*/]+")


def judge(series: Series) -> tuple[str | None, str]:
    """(modality or "sax", by what) of a series; (None, why not) of one that is left out."""
    if reason := _no_image(series) or _made(series.first) or series.no_volume():
        return None, reason
    for text in dict.fromkeys((series.first.description, series.first.protocol)):
        if not text:
            continue
        if reason := left_out(text):
            return None, reason
        if _has(_tokens(text), _INVERSION) and not _has(_tokens(text), _WORDS["flair"]):
            fluid = by_times(series.first) == "flair"
            return ("flair", "by its inversion time") if fluid else (None, "inversion without the fluid's")
        if found := named(text):
            return _one(found, text, series)
    if series.first.b_value:
        return None, "diffusion"
    if (timed := by_times(series.first)) and series.first.body_part not in _CHEST:
        return _enhanced(timed, series.first), "by its echo and repetition times"
    return None, "its description says no modality"


def _one(found: Set[str], text: str, series: Series) -> tuple[str | None, str]:
    """The modality that the words of a description mean, or why that is not certain."""
    timed = by_times(series.first)
    if series.echo and found == {"pd", "t2"} and timed in found:
        return timed, "by its description and echo time"
    found = meant(found)
    if STACK in found and len(found) > 1:
        found = found - {STACK} if series.first.body_part in _HEAD else {STACK}
    if STACK not in found and series.first.body_part in _CHEST:
        return None, "of the chest, and not a short axis by its description"
    if len(found) > 1:
        return None, f"its description says {' and '.join(sorted(found))}"
    (element,) = found
    if element == "flair" and timed == "t1":
        return None, "its description says FLAIR, its times say T1"
    if element == "t1" and agent(text) is not False and (agent(text) or series.first.contrast):
        return "t1ce", BY_DESCRIPTION if agent(text) else "by its description and contrast agent"
    return element, BY_DESCRIPTION


def unusable(series: Series) -> str | None:
    """Why a series cannot be taken even if the user names it; None where it can."""
    return _no_image(series) or series.no_volume()


def _no_image(series: Series) -> str | None:
    """Why a series is none of a scanner's magnetic resonance images; None where it is."""
    if any(header.synthetic for header in series.headers):  # of a stack, some slices are
        return SYNTHETIC
    header = series.first
    if not header.is_mr:
        return f"no MR image ({header.kind})" if header.kind not in ("MR", "") else "no MR image"
    return None


def _made(header: Header) -> str | None:
    """Why a series is not what the scanner measured."""
    kinds = set(header.image_type)
    if "LOCALIZER" in kinds:
        return "a localizer"
    if kinds & {"ADC", "TRACEW", "FA", "DIFFUSION", "DWI"}:
        return "diffusion"
    if kinds & {"P", "PHASE", "PHASE MAP", "R", "REAL", "I", "IMAGINARY"}:
        return "a phase, real or imaginary part"
    corrected = "PRIMARY" in kinds and kinds & {"DIS2D", "DIS3D", "NORM"}
    if ("DERIVED" in kinds and not corrected) or kinds & {"PROJECTION IMAGE", "MPR", "MIP", "MNIP"}:
        return "derived from other images"
    return None


def _tokens(text: str) -> list[str]:
    """Words of a description in lower case, also two at a time, as some are written apart."""
    words = [word for word in _SPLIT.split(_FAT.sub(" ", text.lower())) if word]
    return [*words, *(a + b for a, b in pairwise(words))]


def _has(tokens: Iterable[str], pattern: str) -> bool:
    return any(re.fullmatch(pattern, token) for token in tokens)


def left_out(text: str) -> str | None:
    """What a description names that is no image of the table's; None where it names nothing of the kind."""
    tokens = _tokens(text)
    if _has(tokens, _WORDS["flair"]):  # `FLAIR FA` and `dark-fluid` are one, whatever else they say of echo or fat
        tokens = [token for token in tokens if token not in ("fa", "star", "epi")]
    if _has(tokens, _WORDS["t1"]):  # a gradient echo may be one
        tokens = [token for token in tokens if token not in ("gre", "ffe")]
    tokens = [token for token in tokens if not any(_has([token], words) for words in _WORDS.values())]
    for what, words in _LEFT_OUT:
        if _has(tokens, "|".join(word.replace("-", "") for word in words.split())):
            return what
    return None


def named(text: str) -> set[str]:
    """The modalities that a description holds words of; T1 stands for both, with contrast agent and without."""
    tokens = _tokens(text)
    found = {element for element, words in _WORDS.items() if _has(tokens, words)}
    return found | ({"t1"} if _has(tokens, _T1_AGENT) else set())


def agent(text: str) -> bool | None:
    """Whether a description says with contrast agent or without; None where it says neither, or both."""
    if _BOTH.search(text.lower()):
        return None
    tokens = _tokens(_SLASH.sub(" ", text.lower()))
    if MINUS.search(text) or _has(tokens, _PLAIN):
        return False
    return True if _has(tokens, f"{_AGENT}|{_T1_AGENT}") else None


def perhaps(element: str, text: str) -> set[str]:
    """What an image of an element may be by other words: T1 with contrast agent or without, T2 or FLAIR."""
    tokens = _tokens(text)
    if element == "t1" and _has(tokens, f"{_AGENT}|{_T1_AGENT}"):
        return {"t1", "t1ce"}
    if element == "t2" and _has(tokens, f"{_INVERSION}|{_DARK}"):
        return {"t2", "flair"}
    return {element}


def by_times(header: Header) -> str | None:
    """The modality that echo, repetition and inversion times (ms) make; None where they do not say.

    Wide margins around what is usual at 1.5 and 3 T, with gaps between.
    """
    echo, repetition, inversion = header.echo_time, header.repetition_time, header.inversion_time or 0
    if echo is None or repetition is None or not repetition:
        return None
    if inversion > 1500 and echo > 60 and repetition > 4000:
        return "flair"
    if inversion > 1200 or 0 < inversion < 400:
        return None
    if 400 <= inversion <= 1200:
        return "t1" if echo < 30 and repetition < 4000 else None
    if echo > 65 and repetition > 2000:
        return "t2"
    if echo < 35 and repetition > 1800 and "GR" not in header.scanning:
        return "pd"
    return "t1" if echo < 30 and 300 < repetition < 900 and "SE" in header.scanning else None


def _enhanced(element: str, header: Header) -> str:
    return "t1ce" if element == "t1" and header.contrast else element
