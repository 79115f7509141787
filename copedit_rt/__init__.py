"""CoPeDiT runtime: fill in what is missing from an MRI study."""

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _check_kernels() -> None:
    # An unrelated package on the index has the import name `kernels`. Looked at, not imported: that would load torch.
    spec = importlib.util.find_spec("kernels")
    origin = spec.origin if spec else None
    if not origin or 'PROJECT = "copedit"' not in Path(origin).read_text(encoding="utf-8"):
        raise ImportError(
            f"copedit_rt needs its own package `kernels`, but {origin or 'none'} is what Python finds; "
            "uninstall the other one or put CoPeDiT first on the path."
        )


_check_kernels()

if TYPE_CHECKING:
    from copedit_rt.config import ModelConfig
    from copedit_rt.errors import CopeditError
    from copedit_rt.study import Study, find_studies
    from copedit_rt.synthesizer import Synthesizer

_PUBLIC = {
    "CopeditError": "copedit_rt.errors",
    "ModelConfig": "copedit_rt.config",
    "Study": "copedit_rt.study",
    "Synthesizer": "copedit_rt.synthesizer",
    "find_studies": "copedit_rt.study",
}
__all__ = ["CopeditError", "ModelConfig", "Study", "Synthesizer", "__version__", "find_studies"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `copedit --help` does not pay for torch.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
