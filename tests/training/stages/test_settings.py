"""What a run can be told, and what is refused."""

import pytest

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_training.stages.settings import load_settings


def test_the_papers_settings():
    for preset, sizes, steps in (
        ("brain-brats", (8, 32), (400_000, 100_000)),
        ("brain-ixi", (8, 32), (400_000, 100_000)),
        ("cardiac", (64, 64), (100_000, 100_000)),
    ):
        first, second = (load_settings(stage, preset) for stage in ("tokenizer", "denoiser"))
        assert (first.batch_size * first.accumulate, second.batch_size * second.accumulate) == sizes
        assert (first.steps, second.steps) == steps
        assert (first.lr, second.lr) == (1e-4, 5e-5) and first.beta2 == second.beta2 == 0.999
        assert second.ema == 0.9999 and first.weight_decay == 0 and 0 <= first.adversarial_from < first.steps
        assert ModelConfig.preset(preset)


def test_bad_settings_are_named():
    for override, message in (
        ("speed=3", "--set speed=3: expected key=value"),
        ("steps=many", "'many' is not a valid int"),
        ("steps=0", "steps = 0: must be at least 1"),
        ("prompt_steps=99999", "prompt_steps = 99999: must be at least 0 and below steps = "),
        ("draws=0", "draws = 0: must be at least 1"),
        ("optimizer=sgd", "optimizer = 'sgd': must be adam or muon"),
        ("compile=maybe", "'maybe' is not a valid switch"),
        ("dtype=int8", "dtype = 'int8'"),
        ("export=int8", "export = 'int8'"),
    ):
        with pytest.raises(CopeditError, match=message):
            load_settings("tokenizer", "demo-brain", [override])
    with pytest.raises(CopeditError, match="preset 'nope' has no training settings; choose one of brain-brats"):
        load_settings("tokenizer", "nope")
