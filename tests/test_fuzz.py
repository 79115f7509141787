"""Seeded mutations of all that comes from outside: every case ends as it should, or in one sentence of a CopeditError.

A case is a kind and a number, which are all that it depends on: `one(kind, number, place)`. 500 cases run by default,
10,000 with `-m slow`.
"""

import gzip
import json
import logging
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import run, save
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from small import BRAIN, HEART, saved

from copedit_rt import checkpoint, cohort, prior
from copedit_rt.config import DiffusionConfig, ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.images.nifti import Volume
from copedit_rt.images.study import Study
from copedit_rt.synthesizer import Synthesizer
from copedit_training.data import prepared
from copedit_training.data.layouts import split
from copedit_training.stages import checkpoints
from copedit_training.stages.settings import load_settings

LONGEST = 20.0  # seconds of a case
EXTREMES = [0, 1, -1, 2, 255, 32767, -32768, 2**31 - 1, 2**63 - 1, 0.5, 1e-30, 1e30, 3e38, float("nan"), float("inf")]
AFFINE = np.diag([-3.0, 3.0, 4.0, 1.0])
AFFINE[:3, 3] = (15, -16, -17)


class Slow(BaseException):
    """A case took too long."""


@contextmanager
def limited(seconds: float = LONGEST) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise Slow(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def told(call: Callable[[], Any]) -> Any:
    """What a call gives; None where it ends in a sentence. Nothing else may come out of it."""
    try:
        return call()
    except CopeditError as error:
        sentence(str(error))
        return None


def sentence(text: str) -> None:
    assert "this is not foreseen" not in text, text
    assert len(text.splitlines()) <= 1 or "not valid JSON" in text, text


# ---- what is mutated


class Place:
    """Models, studies and runs that cases start from, and a folder that each case has to itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        small = DiffusionConfig(steps=1)
        self.models = {
            "brain": saved(replace(BRAIN, diffusion=small), folder / "brain"),
            "cardiac": saved(replace(HEART, diffusion=small), folder / "heart"),
        }
        self.loaded = {task: Synthesizer.load(path, "cpu") for task, path in self.models.items()}
        draw = np.random.default_rng(0)
        affine = AFFINE
        for name in ("t1", "t2"):
            save(folder / "study" / f"case_{name}.nii", draw.uniform(10, 900, (10, 11, 8)).astype(np.float32), affine)
        stack = draw.uniform(10, 900, (12, 12, 9)).astype(np.float32)
        stack[..., 4] = 0
        save(folder / "stack" / "sax_case.nii", stack, np.diag([3.0, 3.0, 8.0, 1.0]))
        self.files = {p.name: p.read_bytes() for p in folder.rglob("*.nii")}
        self.config = json.loads((self.models["brain"] / "config.json").read_text())
        self.weights = {p.name: p.read_bytes() for p in self.models["brain"].glob("*.safetensors")}
        self.run = folder / "run"
        described = {"stage": "tokenizer", "settings": {}, "model": self.config}
        checkpoints.claim(self.run, self.described(described), resume=False)
        parts = {"task": {"a": torch.ones(3)}, "optimizer": {"0.0.step": torch.ones(1)}}
        for step in (2, 4):
            checkpoints.store(self.run, step, parts, 9)
        (self.run / "log.jsonl").write_text("".join(json.dumps({"step": i, "loss": 0.5}) + "\n" for i in range(4)))
        rows = [{"study": f"s{i}", "subject": f"s{i}", "centre": [1.0, 2.0]} for i in range(3)]
        (self.run / "images.json").write_text(json.dumps({"about": {}, "studies": rows, "skipped": []}))
        split([f"s{i}" for i in range(5)], self.run / "split.json")
        np.save(self.run / "phantom.npy", np.zeros((2, 4, 1, 16, 16, 8), np.float16))
        (folder / "nothing").mkdir()
        (folder / "prior").mkdir()
        m = len(BRAIN.elements)
        layers = {"mean": np.zeros(m * 9, np.float32), "scale": np.ones(m * 9, np.float32)}
        layers |= {"w0": np.ones((m * 9, m), np.float32), "b0": np.zeros(m, np.float32)}
        prior.write(folder / "prior", layers)
        self.prior = (folder / "prior" / prior.PRIOR).read_bytes()

    def described(self, run: dict[str, Any]) -> dict[str, Any]:
        settings = load_settings("tokenizer", "demo-brain")
        return run | {"settings": {k: getattr(settings, k) for k in vars(settings)}}

    @contextmanager
    def case(self) -> Iterator[Path]:
        folder = self.folder / "case"
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def scribble(draw: random.Random, content: bytes, most: int = 4, within: int | None = None) -> bytes:
    """Some bytes changed, cut off, put in or doubled; within: only the first so many."""
    changed, end = bytearray(content), min(len(content), within or len(content))
    for _ in range(draw.randint(1, most)):
        where = draw.randrange(max(1, end))
        match draw.randrange(6):
            case 0 | 1:
                changed[where : where + 1] = bytes([draw.randrange(256)])
            case 2:
                changed[where : where + 4] = draw.choice([b"\0" * 4, b"\xff" * 4, struct.pack("<f", float("nan"))])
            case 3:
                del changed[where:]
            case 4:
                del changed[where : where + draw.randint(1, 64)]
            case _:
                pieces = [b"\0", b"[", b"{", b'"', b"9" * 40, b"\xff\xfe"]
                changed[where:where] = draw.choice(pieces) * draw.randint(1, 9)
    return bytes(changed)


def header_field(draw: random.Random, content: bytes) -> bytes:
    """A field of a NIfTI header with a value that it may not have."""
    dtype = nib.nifti1.header_dtype
    texts = ("data_type", "db_name", "descrip", "aux_file", "intent_name")
    name = draw.choice([n for n in dtype.names if n not in texts])
    kind, offset = dtype.fields[name]
    base, count = (kind.subdtype[0], int(np.prod(kind.subdtype[1]))) if kind.subdtype else (kind, 1)
    changed = bytearray(content)
    for index in draw.sample(range(count), draw.randint(1, min(count, 3))):
        if base.kind == "S":
            value = bytes(draw.randrange(256) for _ in range(base.itemsize))
        else:
            with np.errstate(all="ignore"):
                extreme = draw.choice([*EXTREMES, draw.uniform(-10, 10), draw.randint(-9, 300)])
                value = np.array(np.nan_to_num(extreme) if base.kind in "iu" else extreme)
                value = value.astype(np.float64).clip(-(2.0**62), 2.0**62).astype(base).tobytes()
        changed[offset + index * base.itemsize : offset + (index + 1) * base.itemsize] = value
    return bytes(changed)


def body(draw: random.Random, content: bytes) -> bytes:
    """Some voxels with values that no scan has."""
    changed = bytearray(content)
    voxels = np.frombuffer(changed, "<f4", offset=352)
    count = draw.choice([1, 5, voxels.size // 2, voxels.size])
    where = np.random.default_rng(draw.randrange(2**32)).permutation(voxels.size)[:count]
    voxels.flags.writeable and voxels.__setitem__(where, np.float32(draw.choice(EXTREMES)))
    return bytes(changed)


def as_other(draw: random.Random, content: bytes) -> bytes:
    """The same image in another type, byte order, scaling or version, with a field changed on top."""
    image = nib.Nifti1Image.from_bytes(content)
    kind = draw.choice(["u1", "i2", "u2", "i4", "f4", "f8", "i8", "u8"])
    data = np.asarray(image.dataobj)
    data = np.rint(data / 4) if kind[0] in "iu" else data
    made = draw.choice([nib.Nifti1Image, nib.Nifti2Image])(data.astype(kind), image.affine, dtype=kind)
    made.header.set_xyzt_units(draw.choice(["mm", "meter", "micron", "unknown"]))
    if draw.random() < 0.5:
        made.header.set_slope_inter(draw.choice([1, 2, -1, 1e-20, 1e30]), draw.choice([0, 1, -1e30]))
    if draw.random() < 0.5:
        made.header.set_qform(made.affine @ np.diag([1, 1, draw.choice([1, 1, 1.001, 2]), 1]), draw.randint(0, 4))
    content = made.to_bytes()
    return header_field(draw, content) if type(made) is nib.Nifti1Image and draw.random() < 0.5 else content


def image_file(draw: random.Random, content: bytes) -> bytes:
    content = draw.choice([header_field, header_field, header_field, body, as_other, _scribbled])(draw, content)
    if draw.random() < 0.3:
        content = gzip.compress(content, 1, mtime=0)
        content = scribble(draw, content, 2) if draw.random() < 0.3 else content
    return content


def _scribbled(draw: random.Random, content: bytes) -> bytes:
    return scribble(draw, content, within=352)


def changed_json(draw: random.Random, data: Any) -> Any:
    """A value somewhere in it replaced, taken out or put in."""
    values = [*EXTREMES, 10**30, -(10**30), "", "x", "\x1b[2J", "../..", "x" * 500, None, True, [], {}]
    values += [[[]] * 9, [1] * 900]
    if isinstance(data, dict) and data and draw.random() < 0.9:
        key = draw.choice(sorted(data))
        changed = dict(data)
        match draw.randrange(8):
            case 0:
                del changed[key]
            case 1:
                changed[draw.choice(["x", "", "name", key + "_"])] = draw.choice(values)
            case _:
                changed[key] = changed_json(draw, data[key])
        return changed
    if isinstance(data, list) and data and draw.random() < 0.8:
        changed, where = list(data), draw.randrange(len(data))
        changed[where] = changed_json(draw, data[where])
        return changed
    if isinstance(data, int | float) and not isinstance(data, bool) and draw.random() < 0.4:
        return draw.choice([data * 2, -data, data + 1, data * 1000, 2**20])
    return draw.choice(values)


# ---- what a case does


def brain(draw: random.Random, place: Place) -> None:
    with place.case() as folder:
        (folder / "in").mkdir()
        for name in ("case_t1.nii", "case_t2.nii"):
            spoilt = name == "case_t1.nii" or draw.random() < 0.2
            content = image_file(draw, place.files[name]) if spoilt else place.files[name]
            (folder / "in" / (name + ".gz" * (content[:2] == b"\x1f\x8b"))).write_bytes(content)
        synthesise(place, folder, "brain", resample=draw.random() < 0.5)


def heart(draw: random.Random, place: Place) -> None:
    with place.case() as folder:
        content = image_file(draw, place.files["sax_case.nii"])
        (folder / "in").mkdir()
        (folder / "in" / ("sax_case.nii" + ".gz" * (content[:2] == b"\x1f\x8b"))).write_bytes(content)
        synthesise(place, folder, "cardiac", missing_slices=draw.choice([None, [2], [0, 8]]))


def synthesise(place: Place, folder: Path, task: str, **options: Any) -> None:
    """Outputs that nibabel opens, where we say that they lie, all of them finite and whole; or nothing at all."""
    output = folder / "out"
    model = str(place.models[task])
    summary = told(lambda: cohort.synthesise([folder / "in"], output, model=model, task=task, **options))
    if summary is None:
        assert not output.exists() or not list(output.rglob("*")), "something was written all the same"
        return
    for path in (Path(path) for entry in summary["studies"] for path in entry["outputs"].values()):
        image = nib.load(path)
        assert np.isfinite(np.asarray(image.dataobj)).all()
        said = json.loads(path.with_name(path.name.split(".nii")[0] + ".json").read_text(), parse_constant=pytest.fail)
        unit = {1: 1000.0, 3: 0.001}.get(int(image.header["xyzt_units"]) & 7, 1.0)
        ours = np.array(said["geometry"]["affine"])
        theirs = np.diag([unit, unit, unit, 1]) @ image.affine
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5 * np.abs(ours).max())
        given = next(p for p in (folder / "in").iterdir() if "t1" in p.name or "sax" in p.name)
        with suppress(HeaderDataError, ImageFileError):  # an input that only we could read
            reference = nib.load(given).affine
            np.testing.assert_allclose(image.affine, reference, rtol=1e-6, atol=1e-6 * np.abs(image.affine).max())


def configuration(draw: random.Random, place: Place) -> None:
    with place.case() as folder:
        data: Any = place.config
        for _ in range(draw.randint(1, 3)):
            data = changed_json(draw, data)
        text = json.dumps(data).encode()
        if draw.random() < 0.25:
            text = draw.choice([scribble(draw, text), b"[" * 50_000, b'{"a":' * 50_000, text * 2])
        (folder / "config.json").write_bytes(text)
        for name in place.weights:
            (folder / name).symlink_to(place.models["brain"] / name)
        config = told(lambda: checkpoint.read_config(folder))
        if config is None:
            return
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        if told(lambda: (checkpoint.load_tokenizer(folder), checkpoint.load_denoiser(folder))):
            model = Synthesizer.load(folder, "cpu")
            if config.task == "brain" and config.diffusion.steps <= 4:
                volumes = {"t1": Volume.from_array(np.random.default_rng(0).random((10, 11, 8)) + 0.1, AFFINE)}
                result = told(lambda: model.synthesize(Study("s", config.task, volumes)))
                assert result is None or all(np.isfinite(v.data).all() for v in result.study.volumes.values())


def weights(draw: random.Random, place: Place) -> None:
    with place.case() as folder:
        shutil.copy(place.models["brain"] / "config.json", folder)
        for name, content in place.weights.items():
            size = 8 + int.from_bytes(content[:8], "little")
            match draw.randrange(4):
                case 0:
                    content = scribble(draw, content, within=size)
                case 1:
                    content = scribble(draw, content)
                case 2:
                    header = changed_json(draw, json.loads(content[8:size]))
                    text = json.dumps(header).encode()
                    content = len(text).to_bytes(8, "little") + text + content[size:]
                case _:
                    content = draw.randrange(2**64).to_bytes(8, "little") + content[8:]
            (folder / name).write_bytes(content)
        told(lambda: checkpoint.load_tokenizer(folder))
        told(lambda: checkpoint.load_denoiser(folder))
        (folder / prior.PRIOR).write_bytes(scribble(draw, place.prior, within=draw.choice([None, 300])))
        told(lambda: prior.Prior.load(folder, BRAIN))


def run_folder(draw: random.Random, place: Place) -> None:
    with place.case() as folder:
        output = Path(shutil.copytree(place.run, folder / "run"))
        for _ in range(draw.randint(1, 2)):
            path = draw.choice(sorted(p for p in output.rglob("*") if p.is_file()))
            content = path.read_bytes()
            match draw.randrange(6):
                case 0:
                    path.unlink()
                    path.mkdir()
                case 1:
                    path.write_bytes(b"")
                case 2:
                    path.write_bytes(content[: len(content) // 2])
                case 3 if path.suffix == ".json" and content == (place.run / path.relative_to(output)).read_bytes():
                    path.write_text(json.dumps(changed_json(draw, json.loads(content))))
                case _:
                    path.write_bytes(scribble(draw, content))
        described = json.loads((place.run / "run.json").read_text())
        told(lambda: checkpoints.claim(output, described, resume=True))
        told(lambda: checkpoints.cut_log(output / "log.jsonl", 2))
        kept = told(lambda: checkpoints.restore(output))
        assert kept is None or kept[1]["a"].tolist() == [1.0] * 3
        told(lambda: split([f"s{i}" for i in range(6)], output / "split.json"))
        told(lambda: prepared.study_names(output))
        told(lambda: prepared.heart_centres(output))
        told(lambda: prepared.mapped(output / "phantom.npy"))


TEXTS = ["", " ", "0", "-1", "²", "1e400", "nan", "9" * 400, "t1", "all", "t1,,flair", "x" * 300, "\x1b[31m", "a=b"]
TEXTS += ["=", ",", "../x", "3-", "0-32767", "5-3", "cuda:²", "cuda:99", "auto", "cpu", "2GB", "1e9GB", "none"]
TEXTS += ["cardiac", "é\udce9"]
OPTIONS = ["--task", "--select", "--model", "--target", "--steps", "--seed", "--samples", "--solver", "--detail"]
OPTIONS += ["--device", "--engine", "--dtype", "--max-memory", "--missing-slices", "--file", "--t1", "--sax", "-i"]
SETTINGS = ["steps", "lr", "beta2", "crop", "batch_size", "dtype", "device", "augment", "seed", "x", ""]


def options(draw: random.Random, place: Place) -> None:
    with place.case() as folder:
        command = draw.choice(["synth", "synth", "inspect", "train", "settings"])
        if command == "settings":
            value = f"{draw.choice(SETTINGS)}={draw.choice(TEXTS)}" if draw.random() < 0.9 else draw.choice(TEXTS)
            told(lambda: load_settings(draw.choice(["tokenizer", "denoiser"]), "demo-brain", [value]))
            return
        arguments = [command]
        if command == "train":
            arguments = ["train", "denoiser", "--preset", draw.choice(["demo-brain", *TEXTS]), "--set", "tokenizer=/no"]
            arguments += ["--set", f"{draw.choice(['steps', 'lr', 'seed', 'subjects'])}={draw.choice(TEXTS)}"]
        if command != "inspect":
            arguments += ["-o", str(folder / "out")]
        if command != "train":
            arguments += ["-i", str(place.folder / "study"), "--model", str(place.models["brain"])]
            for option in draw.sample(OPTIONS, draw.randint(1, 2)):
                arguments += [option, draw.choice(TEXTS)]
        arguments = [a.replace("\0", "") for a in arguments]
        result = run(*arguments)
        assert result.exit_code in (0, 1, 2, 3), result.output
        assert "Traceback" not in result.stderr and "\x1b" not in result.stderr, result.stderr
        if result.exit_code == 1:
            (line,) = (x for x in result.stderr.splitlines() if x.startswith("copedit: "))
            sentence(line)


KINDS = {kind.__name__: kind for kind in (brain, heart, configuration, weights, run_folder, options)}
SHARES = {"brain": 150, "heart": 80, "configuration": 80, "weights": 60, "run_folder": 60, "options": 70}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def ready(place, monkeypatch) -> Place:
    """Built-in models are never loaded: the loaded ones stand for them."""
    real = Synthesizer.load

    def load(model: Any, *given: Any, **more: Any) -> Synthesizer:
        asked = {k: v for k, v in more.items() if v and k != "progress"}
        plain = asked in ({"engine": "torch", "dtype": "auto"}, {})
        for task, folder in place.models.items():
            if str(model) == str(folder) and given in (("auto",), ("cpu",)) and plain:
                return place.loaded[task]
        return real(model, *given, **more)

    monkeypatch.setattr(Synthesizer, "load", load)
    monkeypatch.chdir(place.folder / "nothing")  # where an empty path leads to
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    return place


def one(kind: str, number: int, place: Place) -> None:
    try:
        with limited():
            KINDS[kind](random.Random(f"{kind} {number}"), place)
    except (Exception, Slow) as error:
        raise AssertionError(f"case {kind}:{number}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("kind", KINDS)
def test_mutations(ready, kind):
    for number in range(SHARES[kind]):
        one(kind, number, ready)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_mutations(ready, kind, part):
    """Those of the default run are the first of them."""
    for number in range(part * SHARES[kind], (part + 1) * SHARES[kind]):
        one(kind, number, ready)


def test_shares_are_what_the_text_says():
    assert sum(SHARES.values()) == 500
