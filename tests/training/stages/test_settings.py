"""What a run can be told, and what is refused."""

import dataclasses
import re

import pytest

from copedit_rt.config import ModelConfig
from copedit_rt.errors import CopeditError
from copedit_training.stages import settings
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


def test_a_preset_that_lacks_what_has_no_default_is_told_so(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text("[tokenizer]\nsteps = 4\nbatch_size = 1\n")
    monkeypatch.setattr(settings, "_PRESETS", tmp_path)
    with pytest.raises(CopeditError, match=r"its section \[tokenizer\] lacks lr; add it to mine.toml"):
        load_settings("tokenizer", "mine")
    assert load_settings("tokenizer", "mine", ["lr=1e-3"]).lr == 1e-3


def test_keys_values_and_presets_that_there_are_not():
    for stage, override, message in (
        ("tokenizer", "speed=3", "--set speed=3: expected key=value"),
        ("tokenizer", "steps=many", "'many' is not a valid int"),
        ("denoiser", "compile=maybe", "'maybe' is not a valid switch"),
        ("tokenizer", "compile=true", "compile is a setting of the other stage; the tokenizer has steps, "),
        ("denoiser", "pretext_every=2", "pretext_every is a setting of the other stage; the denoiser has steps, "),
    ):
        with pytest.raises(CopeditError, match=message):
            load_settings(stage, "demo-brain", [override])
    with pytest.raises(CopeditError, match="preset 'nope' has no training settings; choose one of brain-2mm, "):
        load_settings("tokenizer", "nope")


@pytest.mark.parametrize("stage", ["tokenizer", "denoiser"])
def test_every_number_has_a_range(stage):
    sound = load_settings(stage, "demo-brain")
    for name, value in dataclasses.asdict(sound).items():
        if isinstance(value, (bool, str)):
            continue
        for wrong in (-2, 1e300, float("nan"), float("inf")):
            with pytest.raises(CopeditError, match=rf"^{name} = {re.escape(str(wrong))}: must be (from|below)"):
                dataclasses.replace(sound, **{name: wrong})


@pytest.mark.parametrize("wrong", ["seed=-1", "lr=nan", "lr=0", "beta2=2", "weight_decay=-1", "batch_size=1000000000"])
def test_values_out_of_range_are_refused(wrong):
    name, _, value = wrong.partition("=")
    with pytest.raises(CopeditError, match=rf"^{name} = {float(value):.0f}.*: must be from "):
        load_settings("denoiser", "demo-brain", [wrong])


def test_words_are_among_those_there_are():
    for stage, name in (("denoiser", "optimizer"), ("denoiser", "export"), ("tokenizer", "position_loss")):
        with pytest.raises(CopeditError, match=f"^{name} = 'none': must be [a-z0-9-]+ or "):
            load_settings(stage, "demo-brain", [f"{name}=none"])


@pytest.mark.parametrize(
    ("idle", "other"), [("patients_share=0.5", "patients = ''"), ("prompt_crop=64", "prompt_steps = 0")]
)
def test_what_would_change_nothing_is_refused(idle, other):
    with pytest.raises(CopeditError, match=f"--set {idle}: has no effect with {other}; change that, or leave it out"):
        load_settings("tokenizer", "brain-brats", [idle])


def test_patients_of_whom_none_is_drawn_are_refused():
    with pytest.raises(CopeditError, match=r"--set patients=FOLDER: has no effect with patients_share = 0\.0;"):
        load_settings("tokenizer", "brain-2mm", ["patients=FOLDER", "patients_share=0"])
    assert load_settings("tokenizer", "brain-2mm", ["patients=FOLDER"]).patients_share == 0.2


def test_steps_that_leave_none_for_the_rest_say_what_to_do():
    with pytest.raises(CopeditError, match="prompt_steps = 300: must be below steps = 4; set both, or try --quick"):
        load_settings("tokenizer", "demo-brain", ["steps=4"])


def test_what_a_run_is_too_short_for_is_said():
    given = ["steps=1000", "warmup=700", "adversarial_from=700"]
    run = "the run has 700 steps before its last phase"
    assert load_settings("tokenizer", "demo-brain", given).too_late() == [
        f"warmup = 700 lasts to the end: {run}",
        f"quantise_from = 2400 never begins: {run}",
        f"adversarial_from = 700 never begins: {run}",
    ]
    assert load_settings("denoiser", "demo-brain", ["steps=150"]).too_late() == [
        "whole_steps = 200 leaves no step on crops: the run has 150 steps"
    ]


@pytest.mark.parametrize("stage", ["tokenizer", "denoiser"])
@pytest.mark.parametrize("preset", sorted(path.stem for path in settings._PRESETS.glob("*.toml")))
def test_the_presets_own_steps_are_enough(stage, preset):
    for quick in (False, True):
        assert load_settings(stage, preset, quick=quick).too_late() == []


@pytest.mark.parametrize("preset", ["demo-brain", "demo-cardiac", "brain-brats", "brain-ixi", "cardiac"])
def test_quick_is_a_few_steps_on_a_few_subjects(preset):
    for stage in ("tokenizer", "denoiser"):
        quick = load_settings(stage, preset, ["seed=3"], quick=True)
        assert (quick.steps, quick.subjects, quick.seed) == (4, 4, 3) and quick.batch_size <= 2
        assert quick.accumulate == load_settings(stage, preset).accumulate
    tokenizer = load_settings("tokenizer", preset, quick=True)
    assert tokenizer.readout_steps <= 20 and -1 <= tokenizer.adversarial_from <= 2
    assert not quick.compile and quick.whole_steps <= 1
