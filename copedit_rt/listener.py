"""What a long job tells while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copedit_rt.errors import CopeditError
    from copedit_rt.images.find import Found


class Listener:
    """Hears nothing; override the methods of what you want to hear. `copedit_rt.terminal` has the one of the terminal.

    Methods are called from the thread that the job runs in.
    """

    def found(self, found: Found, mine: int) -> None:
        """The studies of a cohort, and how many of them this process works on."""

    def began(self, study: str) -> None:
        """Work on a study began."""

    def step(self, done: int, total: int) -> None:
        """Denoising steps of the study that are done (on a GPU: queued), and all of them."""

    def building(self, what: str, done: int, total: int) -> None:
        """Steps of a preparation that takes long, such as a plan of TensorRT, that are done, and all of them."""

    def ended(self, entry: Mapping[str, Any], error: CopeditError | None) -> None:
        """A study's entry of the summary, and why it failed if it did."""

    def failed(self, error: CopeditError) -> None:
        """What went wrong and is told as a finding; `__cause__` says where it happened."""

    def remark(self, text: str) -> None:
        """Something to know about the model or the engine, in a sentence."""
