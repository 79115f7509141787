"""The loop: what is learnt, stopped, killed, resumed; several processes."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from copedit_rt import checkpoint
from copedit_rt.errors import CopeditError, Stopped
from copedit_rt.trained import TrainedOn
from copedit_training.data import prepared
from copedit_training.stages import checkpoints, progress, trainer
from copedit_training.stages.denoiser_task import DenoiserTask
from copedit_training.stages.tokenizer_task import TokenizerTask
from tests.training.stages.tiny import HEART, TINY, log_of, same_weights, settings, smooth, train, weights


@pytest.mark.parametrize("config", [TINY, HEART], ids=lambda c: c.task)
def test_both_stages_learn_and_give_a_model_that_loads(tmp_path, config):
    tokenizer = train("tokenizer", tmp_path / "a", "steps=60", "lr=5e-3", config=config)
    log = log_of(tmp_path / "a")
    assert np.mean([x["l1"] for x in log[-5:]]) < 0.7 * np.mean([x["l1"] for x in log[:5]])
    model = train("denoiser", tmp_path / "b", "steps=60", "lr=5e-3", f"tokenizer={tokenizer}", config=config)
    log = log_of(tmp_path / "b")
    assert np.mean([x["mse"] for x in log[-5:]]) < 0.8 * np.mean([x["mse"] for x in log[:5]])
    loaded, vae, _ = checkpoint.load_tokenizer(model)
    assert loaded == config
    assert (vae.latent_std != 1).all() and (vae.latent_std > 0).all()
    checkpoint.load_denoiser(model)
    trained = TrainedOn.load(model)
    assert trained.words == "simulated phantoms"
    assert set(trained.known) == ({"stack"} if config.task == "cardiac" else set(config.elements))
    assert trained.known == TrainedOn.load(tokenizer).known


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.0, "contrasts simulated from label maps and 2 patients"),
        (0.1, "contrasts simulated from label maps, phantoms and 2 patients"),
    ],
)
def test_a_model_says_all_that_it_was_trained_on(monkeypatch, share, words):
    monkeypatch.setattr(trainer, "find_studies", lambda *_, **__: ["a", "b"])
    given = settings("tokenizer", "patients=FOLDER", f"phantoms_share={share}")
    assert trainer.trained_words(prepared.Labels(Path("maps")), given, TINY, 1) == words


@pytest.mark.parametrize("stage", ["tokenizer", "denoiser", "denoiser muon"])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, stage, monkeypatch):
    stage, _, optimizer = stage.partition(" ")
    extra = ("steps=5", f"augment={str(not optimizer).lower()}", "crop=0")
    if optimizer:
        extra += (
            f"optimizer={optimizer}",
            "muon_lr=1e-2",
            "whiten=0.5",
            "last_timestep=0.5",
            "whole_steps=1",
            "crop=16",
            "image_weight=0.1",
        )
    if stage == "denoiser":
        extra += (f"tokenizer={train('tokenizer', tmp_path / 'vae', 'steps=2')}",)
    whole = train(stage, tmp_path / "whole", *extra)

    class Stop(Exception):
        pass

    kind = {"tokenizer": TokenizerTask, "denoiser": DenoiserTask}[stage]
    original = kind.after_step

    def after_step(self, step):
        if step == 3:  # after the checkpoint at 2, before the one at 4
            raise Stop
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "after_step", after_step)
        with pytest.raises(Stop):
            train(stage, tmp_path / "stopped", *extra)
    resumed = train(stage, tmp_path / "stopped", *extra, resume=True)
    assert same_weights(whole, resumed, f"{stage}.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "fit", lambda *_: pytest.fail("a finished run was finished again"))
        assert train(stage, tmp_path / "stopped", *extra, resume=True) == resumed
    for name in (f"{stage}.safetensors", "config.json"):
        (resumed / name).unlink()
        train(stage, tmp_path / "stopped", *extra, resume=True)
        assert (resumed / name).exists() and same_weights(whole, resumed, f"{stage}.safetensors")
    assert [p.name for p in sorted((tmp_path / "stopped").glob("checkpoint-*"))] == [
        "checkpoint-00000004",
        "checkpoint-00000005",
    ]


FORK = multiprocessing.get_context("fork")


def forked(*arguments, environment=None, gate=None, **options):
    """train(...) in a process of its own, which has all imports already; no step beyond gate.value begins."""
    original = trainer.learning_rate

    def paced(settings, step):
        while gate is not None and step > gate.value:
            time.sleep(0.001)
        return original(settings, step)

    def body():
        os.environ.update(environment or {})
        torch.set_num_threads(1)
        trainer.learning_rate = paced
        try:
            train(*arguments, **options)
        except CopeditError as error:
            print(error)
            os._exit(error.exit_code)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)

    process = FORK.Process(target=body)
    process.start()
    return process


def steps_done(folder):
    log = folder / "log.jsonl"
    if not log.exists():
        return 0
    lines = log.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # the last may be on its way
    return json.loads(whole[-1])["step"] + 1 if whole else 0


def until(condition, process):
    while process.is_alive() and not condition():
        time.sleep(0.002)
    assert process.is_alive(), "it was to be interrupted"


@pytest.mark.parametrize("stage", ["tokenizer", "denoiser"])
def test_a_run_killed_ten_times_ends_with_the_same_bits(tmp_path, stage):
    extra = ["steps=60", "checkpoint_every=3"]
    if stage == "denoiser":
        extra.append(f"tokenizer={train('tokenizer', tmp_path / 'vae', 'steps=2')}")
    whole = forked(stage, tmp_path / "whole", *extra)
    whole.join()
    random = np.random.default_rng(0)
    for kill in range(10):
        moment = 5 * kill + int(random.integers(1, 6))
        process = forked(stage, tmp_path / "killed", *extra, resume=kill > 0, gate=FORK.Value("i", moment + 3))
        until(lambda moment=moment: steps_done(tmp_path / "killed") >= moment, process)
        time.sleep(random.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    last = forked(stage, tmp_path / "killed", *extra, resume=True)
    last.join()
    assert whole.exitcode == last.exitcode == 0
    assert same_weights(tmp_path / "whole" / "model", tmp_path / "killed" / "model", f"{stage}.safetensors")
    assert [line["step"] for line in log_of(tmp_path / "killed")] == list(range(60)), "none is repeated or lost"
    left = {p.name for p in (tmp_path / "killed").iterdir()}
    assert left == {p.name for p in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_says_so(tmp_path, number, capfd):
    extra = ("steps=40", "checkpoint_every=1000")
    gate = FORK.Value("i", 9)
    process = forked("tokenizer", tmp_path / "stopped", *extra, gate=gate)
    until(lambda: steps_done(tmp_path / "stopped") >= 3, process)
    os.kill(process.pid, number)
    gate.value = 100
    process.join()
    assert process.exitcode == 128 + number
    done = steps_done(tmp_path / "stopped")
    said = f"{number.name}: stopped after step {done - 1}, and all is saved; repeat the command with --resume to go on"
    assert said in capfd.readouterr().out
    assert [p.name for p in (tmp_path / "stopped").glob("checkpoint-*")] == [f"checkpoint-{done:08d}"]
    for folder, resume in (("stopped", True), ("whole", False)):  # in processes alike: threads change the bits
        process = forked("tokenizer", tmp_path / folder, *extra, resume=resume)
        process.join()
        assert process.exitcode == 0
    assert same_weights(tmp_path / "whole" / "model", tmp_path / "stopped" / "model", "tokenizer.safetensors")


def together(*arguments, count=2, **options):
    """The same as the processes of torchrun; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        forked(*arguments, environment=shared | {"RANK": str(i), "LOCAL_RANK": str(i)}, **options) for i in range(count)
    ]
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("stage", ["tokenizer", "denoiser"])
def test_two_processes_do_what_one_does_with_accumulation(tmp_path, stage):
    extra = ["steps=8", "batch_size=1", "accumulate=4", "lr=1e-3", "checkpoint_every=4"]
    if stage == "denoiser":
        extra.append(f"tokenizer={train('tokenizer', tmp_path / 'vae', 'steps=2', config=HEART)}")
    else:
        extra += ["quantise_from=2", "prompt_steps=2", "prompt_batch=1", "draws=2"]
    alone = train(stage, tmp_path / "alone", *extra, config=HEART)
    assert together(stage, tmp_path / "both", *extra, config=HEART) == [0, 0]
    both = log_of(tmp_path / "both")
    assert len(both) == 8, "one process writes"
    for a, b in zip(log_of(tmp_path / "alone"), both, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", "processor_seconds"}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name
    models = (alone, tmp_path / "both" / "model")
    first, second = (checkpoint.read_tensors(model / f"{stage}.safetensors")[0] for model in models)
    for name, value in first.items():
        # The biases before a batch norm are normalised away: their gradient is rounding, which the means then follow.
        if not name.endswith(("conv.0.bias", "conv.3.bias", "running_mean")):
            torch.testing.assert_close(value.float(), second[name].float(), rtol=0.01, atol=2e-4, msg=name)
    if stage == "tokenizer":
        assert all(x["contrast"] > 0.1 for x in both if "contrast" in x), "one subject alone has no negatives"


def test_processes_resume_stop_and_refuse_together(tmp_path, monkeypatch, capfd):
    extra = ("steps=4", "batch_size=1", "accumulate=2", "checkpoint_every=2")
    train("tokenizer", tmp_path / "alone", *extra)
    assert together("tokenizer", tmp_path / "both", *extra) == [0, 0]
    (tmp_path / "both" / "checkpoint-00000004").rename(tmp_path / "hidden")
    assert together("tokenizer", tmp_path / "both", *extra, resume=True) == [0, 0]
    assert same_weights(tmp_path / "hidden", tmp_path / "both" / "checkpoint-00000004", "task.safetensors")

    assert together("tokenizer", tmp_path / "odd", *extra, "accumulate=3") == [1, 1]
    assert "accumulate = 3: 2 processes cannot share so many micro-batches" in capfd.readouterr().out
    original = TokenizerTask.loss

    def broken(self, batch):
        loss, terms = original(self, batch)
        if batch.part == 1:
            terms["l1"] = float("inf")
            loss = loss * float("inf")
        return loss, terms

    monkeypatch.setattr(TokenizerTask, "loss", broken)
    assert together("tokenizer", tmp_path / "broken", *extra) == [1, 99], "process 0 speaks, the other leaves"
    task = TokenizerTask(TINY, settings("tokenizer", *extra), smooth(TINY, 4))
    assert f"step 0: l1 inf, loss inf on subject {task.draw(0, 1).subjects[0]};" in capfd.readouterr().out


def test_validation_is_logged_and_changes_nothing(tmp_path, monkeypatch):
    held_out = np.random.default_rng(5).random((2, 3, 1, 16, 16, 4)).astype(np.float16)
    monkeypatch.setattr(trainer, "watched_images", lambda *_: held_out)
    config = dataclasses.replace(HEART, diffusion=dataclasses.replace(HEART.diffusion, steps=2))
    plain = train("tokenizer", tmp_path / "a", "steps=4", config=config)
    watched = train("tokenizer", tmp_path / "b", "steps=4", "validate_every=2", config=config)
    assert same_weights(plain, watched, "tokenizer.safetensors")
    assert ["val_psnr" in x for x in log_of(tmp_path / "b")] == [False, True, False, True]
    model = train("denoiser", tmp_path / "c", "steps=2", "validate_every=2", f"tokenizer={watched}", config=config)
    line = log_of(tmp_path / "c")[1]
    measured = {name for name in line if name.startswith("val_")}
    assert measured == {f"val_{what}_{count}" for what in ("psnr", "ssim", "mse") for count in (1, 2)}
    assert 0 < line["val_psnr_1"] < 40 and -1 < line["val_ssim_2"] < 1 and line["val_mse_1"] > 0
    assert checkpoint.read_config(model) == config
    assert list((tmp_path / "c" / "tensorboard").iterdir()), "TensorBoard's file"


@pytest.mark.slow
def test_torchrun_runs_the_command(tmp_path):
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    settings = "steps=1 subjects=2 batch_size=1 accumulate=2 prompt_steps=0 readout_steps=0 crop=16 warmup=0"
    sets = [word for item in settings.split() for word in ("--set", item)]
    train = ("-m", "copedit_rt", "train", "tokenizer", "--preset", "demo-cardiac", "-o", str(tmp_path / "a"))
    done = subprocess.run([*command, *train, *sets], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "a" / "model")], "one process prints"
    assert len(log_of(tmp_path / "a")) == 1
    checkpoint.load_tokenizer(tmp_path / "a" / "model")


def test_seeds_differ(tmp_path):
    a, b, c = (train("tokenizer", tmp_path / n, "steps=2", f"seed={s}") for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert same_weights(a, b, "tokenizer.safetensors")
    assert not same_weights(a, c, "tokenizer.safetensors")


def test_a_loss_that_is_not_finite_stops_with_step_term_and_subjects(tmp_path, monkeypatch):
    original = DenoiserTask.loss
    tokenizer = train("tokenizer", tmp_path / "vae", "steps=1")

    def broken(self, batch):
        loss, terms = original(self, batch)
        if batch.step == 3 and 2 in batch.subjects:
            loss = loss * float("nan")
        return loss, terms

    monkeypatch.setattr(DenoiserTask, "loss", broken)
    settings = ("steps=5", "accumulate=8", "batch_size=1", "checkpoint_every=1", f"tokenizer={tokenizer}")
    with pytest.raises(CopeditError, match=r"step 3: loss nan on subject 2; look"):
        train("denoiser", tmp_path / "a", *settings)
    task = weights(tmp_path / "a" / "checkpoint-00000003")
    assert all(value.isfinite().all() for value in task.values()), "nothing of that step is kept"


def test_a_gradient_of_the_discriminator_that_is_not_finite_stops_too(tmp_path, monkeypatch):
    original = TokenizerTask.loss

    def broken(self, batch):
        loss, terms = original(self, batch)
        if batch.step == 2:
            next(self.adversary.parameters()).register_hook(lambda gradient: gradient * float("inf"))
        return loss, terms

    monkeypatch.setattr(TokenizerTask, "loss", broken)
    with pytest.raises(CopeditError, match="step 2: gradient inf on subject"):
        train("tokenizer", tmp_path / "a", "steps=3", "adversarial_from=0", "checkpoint_every=1")


def test_a_start_that_cannot_work_is_refused(tmp_path):
    with pytest.raises(CopeditError, match="needs its tokenizer"):
        train("denoiser", tmp_path / "a", "steps=2")
    with pytest.raises(CopeditError, match="--data /nowhere is not a folder"):
        trainer.run("tokenizer", "demo-brain", tmp_path / "b", data="/nowhere")


def slow_images(config, seed):
    """In place of a phantom: a file that names the worker, and a while."""
    (Path(os.environ["WORKERS"]) / f"worker-{os.getpid()}").touch()
    time.sleep(1)
    return np.zeros((2, 1, 16, 16, 8))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_what_prepares_images_ends_with_the_run_and_leaves_nothing(tmp_path, number, monkeypatch):
    monkeypatch.setattr(trainer, "phantom_images", prepared.phantom_images)
    monkeypatch.setattr(prepared, "model_images", slow_images)
    monkeypatch.setenv("WORKERS", str(tmp_path))
    process = forked("tokenizer", tmp_path / "a", "subjects=50", "steps=1")
    until(lambda: list(tmp_path.glob("worker-*")) and (tmp_path / "a" / "phantom.npy.partial").exists(), process)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    workers = [int(path.name.partition("-")[2]) for path in tmp_path.glob("worker-*")]
    patience = time.monotonic() + 20
    while time.monotonic() < patience and any(map(checkpoints.alive, workers)):
        time.sleep(0.05)
    assert not any(map(checkpoints.alive, workers))
    monkeypatch.setattr(trainer, "phantom_images", smooth)
    train("tokenizer", tmp_path / "a", "subjects=50", "steps=1", resume=True)
    assert not list((tmp_path / "a").glob(".*"))


def test_interrupted_before_its_first_step_a_run_says_how_it_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_images", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Stopped, match="SIGINT: stopped; repeat the command with --resume") as stopped:
            train("tokenizer", tmp_path / "run", "steps=2")
    assert stopped.value.exit_code == 130
    train("tokenizer", tmp_path / "run", "steps=2", resume=True)


def test_a_denoiser_goes_on_with_the_tokenizer_that_it_was_started_with(tmp_path):
    vae = train("tokenizer", tmp_path / "vae", "steps=1")
    run = ("steps=2", f"tokenizer={vae}")
    model, path = train("denoiser", tmp_path / "a", *run), tmp_path / "a" / "run.json"
    described = json.loads(path.read_text())
    assert described["tokenizer"] == checkpoint.digest(vae / checkpoint.TOKENIZER)
    assert train("denoiser", tmp_path / "a", *run, resume=True) == model
    shutil.rmtree(tmp_path / "vae")
    train("tokenizer", tmp_path / "vae", "steps=1", "seed=1")
    with pytest.raises(CopeditError, match=r"started with another tokenizer \(.*run\.json has its SHA-256\); go on"):
        train("denoiser", tmp_path / "a", *run, resume=True)
    with pytest.raises(CopeditError, match="was started with other settings"):
        train("denoiser", tmp_path / "a", *run, "lr=1e-2", resume=True)
    del described["tokenizer"]  # as an older version wrote it
    path.write_text(json.dumps(described))
    assert train("denoiser", tmp_path / "a", *run, resume=True) == model


@pytest.mark.parametrize("stage", ["tokenizer", "denoiser"])
def test_low_precision_augmentation_and_micro_batches_go_together(tmp_path, stage):
    """As the paper's presets have them; tests elsewhere are in float32."""
    extra = ["steps=2", "dtype=bfloat16", "augment=true", "accumulate=2", "crop=0"]
    if stage == "denoiser":
        extra.append(f"tokenizer={train('tokenizer', tmp_path / 'vae', 'steps=1')}")
    train(stage, tmp_path / "a", *extra)
    assert all(np.isfinite(line["loss"]) for line in log_of(tmp_path / "a"))


def test_a_start_that_fails_claims_nothing(tmp_path):
    vae = train("tokenizer", tmp_path / "vae", "steps=1")
    for stage, wrong in (
        ("denoiser", ()),
        ("denoiser", ("tokenizer=/nowhere",)),
        ("denoiser", (f"tokenizer={vae}", "crop=6")),
        ("denoiser", (f"tokenizer={vae}", "augment=true")),
        ("tokenizer", ("crop=10",)),
        ("tokenizer", ("perceptual=/nowhere",)),
        ("tokenizer", ("device=cuda:99",)),
        ("tokenizer", ("dtype=float16", "device=cpu")),
    ):
        with pytest.raises(CopeditError):
            train(stage, tmp_path / "a", *wrong)
        assert not (tmp_path / "a").exists(), wrong


def test_without_a_terminal_lines_say_how_far_it_is(tmp_path, capfd, monkeypatch):
    train("tokenizer", tmp_path / "a", "steps=3")
    said = capfd.readouterr().err.splitlines()
    lines = [line for line in said if line.startswith("tokenizer: step ")]
    assert lines[0].startswith("tokenizer: step 1 of 3, 0:00:") and " left, " in lines[0] and " l1 " in lines[0]
    assert lines[-1].startswith("tokenizer: step 3 of 3, 0:00:00 left, ") and len(lines) == 2
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    vae = train("tokenizer", tmp_path / "b", "steps=3", "readout_steps=1", "quantise_from=3")
    said = capfd.readouterr().err
    assert "\nquantise_from = 3 never begins: the run has 3 steps\n" in said
    assert said.count("tokenizer: step ") == 3 and said.count("reading out: subject ") == 4
    train("denoiser", tmp_path / "c", "steps=1", f"tokenizer={vae}")
    assert capfd.readouterr().err.count("encoding: view ") == 2 * 4


def test_a_log_is_json_whatever_the_numbers_are(tmp_path):
    with trainer._Log(tmp_path, 0, 1, Console(quiet=True)) as log:
        log.write(0, {"loss": float("nan"), "gradient": float("inf"), "l1": 0.5}, None)
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 0, "loss": None, "gradient": None, "l1": 0.5}


@pytest.mark.parametrize("damage", ["halved", "foreign", "another shape"])
def test_what_a_denoiser_keeps_beside_its_run_is_made_again(tmp_path, damage):
    """Latents and prompts are computed again where they are not this tokenizer's of these images."""
    vae = train("tokenizer", tmp_path / "vae", "steps=1")
    run = ("steps=1", f"tokenizer={vae}")
    train("denoiser", tmp_path / "a", *run)
    for name in ("run.json", "log.jsonl"):
        (tmp_path / "a" / name).unlink()
    shutil.rmtree(tmp_path / "a" / "checkpoint-00000001")
    path, before = tmp_path / "a" / "prompts.safetensors", (tmp_path / "a" / "prompts.safetensors").read_bytes()
    if damage == "halved":
        path.write_bytes(before[: len(before) // 2])
    elif damage == "foreign":
        checkpoint.write_tensors(path, {"x": torch.zeros(1)})
    else:
        np.save(tmp_path / "a" / "latents.npy", np.zeros((2, 3), np.float16))
    model = train("denoiser", tmp_path / "a", *run)
    assert path.read_bytes() == before
    clean = train("denoiser", tmp_path / "b", *run)
    assert (model / "denoiser.safetensors").read_bytes() == (clean / "denoiser.safetensors").read_bytes()


def test_a_quick_run_of_both_stages_ends(tmp_path):
    run = {"config": TINY, "quick": True}
    extra = ("dtype=float32", "crop=0", "whiten=0")
    vae = trainer.run("tokenizer", "demo-brain", tmp_path / "a", overrides=extra[:2], **run)
    trainer.run(
        "denoiser", "demo-brain", tmp_path / "b", overrides=(*extra, "image_weight=0", f"tokenizer={vae}"), **run
    )
    assert len(log_of(tmp_path / "a")) == len(log_of(tmp_path / "b")) == 4
