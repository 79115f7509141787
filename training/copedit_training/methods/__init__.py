"""The methods of the paper's tables beside CoPeDiT, a file each, behind one interface (`base.Method`)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from copedit_rt.errors import CopeditError

if TYPE_CHECKING:
    from copedit_training.methods.base import Method

# Name on the command line and in presets: where its class is. A module is imported when its method is asked for.
METHODS = {
    "mmgan": "mmgan:MMGAN",
    "mmt": "mmt:MMT",
    "hyper-gae": "hyper_gae:HyperGAE",
    "ldm": "ldm:LDM",
    "controlnet": "controlnet:ControlNet",
    "m2dn": "m2dn:M2DN",
    "diffm4ri": "diffm4ri:DiffM4RI",
}


def method(name: str) -> type[Method]:
    """The class of a method. Raises CopeditError for another name."""
    if name not in METHODS:
        raise CopeditError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}")
    module, _, kind = METHODS[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), kind)
