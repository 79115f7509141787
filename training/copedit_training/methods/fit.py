"""Training a method: `trainer.fit`, with the settings of the method's section in a preset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_training.methods import method
from copedit_training.methods.base import check
from copedit_training.stages import distributed, trainer
from copedit_training.stages.settings import load_settings


def fit(
    name: Any,
    preset: str,
    output: Path,
    data: str = "phantom",
    overrides: Sequence[str] = (),
    resume: bool = False,
    config: ModelConfig | None = None,
    quick: bool = False,
) -> Path:
    """Train a method, alone or as one of torchrun's processes; returns its model folder `output/model`.

    name: of `METHODS`; the rest and what is raised: as of `trainer.run`.
    """
    kind = method(name)
    settings = load_settings(name, preset, overrides, quick, kind.kind)
    config = config or ModelConfig.preset(preset)
    check(kind, settings, overrides)
    trainer.check_subjects(data, overrides)
    with distributed.processes(settings.device):
        found = trainer.source(data, config)
        tokenizer, taken = None, {}
        if kind.needs_tokenizer(settings):
            if not settings.tokenizer:
                raise CopeditError(f"{kind.title} needs a tokenizer: add --set tokenizer=NAME_OR_FOLDER")
            tokenizer, taken["tokenizer"] = trainer.load_tokenizer(preset, config, settings.tokenizer)
        described = trainer.describe(settings, config, data, found, taken) | {"method": name}
        trainer.get_ready(settings)
        made = kind(config, settings, tokenizer)
        most = settings.subjects if quick else None
        return trainer.carry_out(
            described, output, settings, config, found, lambda images: made.on(images, output), resume, most
        )
