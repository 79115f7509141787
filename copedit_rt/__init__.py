"""CoPeDiT runtime: fill in what is missing from an MRI study."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"


if TYPE_CHECKING:
    from copedit_rt.client import Client
    from copedit_rt.config import ModelConfig
    from copedit_rt.errors import CopeditError
    from copedit_rt.filling import fill
    from copedit_rt.images.find import find_studies
    from copedit_rt.images.nifti import Volume
    from copedit_rt.images.study import Study
    from copedit_rt.synthesizer import Result, Synthesizer
    from copedit_rt.triton_client import TritonClient

_PUBLIC = {
    "Client": "copedit_rt.client",
    "CopeditError": "copedit_rt.errors",
    "ModelConfig": "copedit_rt.config",
    "Result": "copedit_rt.synthesizer",
    "Study": "copedit_rt.images.study",
    "Synthesizer": "copedit_rt.synthesizer",
    "TritonClient": "copedit_rt.triton_client",
    "Volume": "copedit_rt.images.nifti",
    "fill": "copedit_rt.filling",
    "find_studies": "copedit_rt.images.find",
}
__all__ = [
    "Client",
    "CopeditError",
    "ModelConfig",
    "Result",
    "Study",
    "Synthesizer",
    "TritonClient",
    "Volume",
    "__version__",
    "fill",
    "find_studies",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that `copedit --help` does not pay for torch.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
