"""Frechet distances against published implementations, and what the networks are shown."""

import ast
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import FIDMetric
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from typer.testing import CliRunner

from copedit_rt.cli import app
from copedit_rt.errors import CopeditError
from copedit_rt.images.grids import Orientation
from copedit_training.evaluation.compare import Pair
from copedit_training.evaluation.features import BATCH, Gaussian, Networks, frechet_distance


def gaussian(features, parts=3):
    out = Gaussian()
    for part in np.array_split(features, parts):
        out.add(part)
    return out


def two_sets(n, f, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((f, f)) / np.sqrt(f)
    return rng.standard_normal((n, f)) @ mix + 3, 1.3 * rng.standard_normal((n + 7, f)) @ mix.T + 3.2


class Given(nn.Module):
    """The features of images that are features."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


@pytest.mark.parametrize(("n", "f"), [(300, 12), (40, 24)])
def test_the_distance_is_that_of_torchmetrics_and_monai(n, f):
    real, fake = two_sets(n, f)
    ours = frechet_distance(gaussian(fake), gaussian(real))
    assert ours == pytest.approx(frechet_distance(gaussian(real), gaussian(fake)), rel=1e-9)
    monai = FIDMetric()(torch.from_numpy(fake), torch.from_numpy(real))
    assert ours == pytest.approx(float(monai), rel=1e-6)

    metric = FrechetInceptionDistance(feature=Given(f))
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    assert ours == pytest.approx(float(metric.double().compute()), rel=1e-5)


def test_the_distance_in_closed_form():
    """Of diagonal covariances: sum of (deviation differences)^2, plus that of the means."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 4))
    x = np.linalg.qr(x - x.mean(0))[0] * np.sqrt(499)  # mean 0, covariance 1, exactly
    one, two = np.array([1.0, 2.0, 3.0, 0.5]), np.array([2.0, 2.0, 1.0, 0.0])
    expected = ((one - two) ** 2).sum() + 4 * 0.3**2
    assert frechet_distance(gaussian(x * one), gaussian(x * two + 0.3)) == pytest.approx(expected)
    assert frechet_distance(gaussian(x), gaussian(x)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(gaussian(x[:1], 1), gaussian(x)) is None
    # Fewer samples than features: no root of a negative rounding error.
    few, many = rng.standard_normal((2, 5, 64))
    assert np.isfinite(frechet_distance(gaussian(few), gaussian(many)))


# ---- with networks ---------------------------------------------------------------------------------------------------


class Moments(nn.Module):
    """Features of slices or volumes that can be computed by hand."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        first = x[:, 1].flatten(1)
        return torch.stack((first.mean(1), first.amax(1), (flat * flat).mean(1), x[:, 2, ..., 0].flatten(1).mean(1)), 1)


class Gap(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().flatten(1).mean(1)[:, None, None, None]


def saved(path, module):
    with pytest.warns(DeprecationWarning):
        torch.jit.script(module).save(str(path))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    return {
        "fid": saved(folder / "fid.pt", Moments()),
        "fvd": saved(folder / "fvd.pt", Moments()),
        "lpips": saved(folder / "lpips.pt", Gap()),
    }


def moments(x):
    """`Moments` of grey images [N, ...] in numpy."""
    flat = x.reshape(len(x), -1)
    return np.stack((flat.mean(1), flat.max(1), (flat**2).mean(1), x[..., 0].reshape(len(x), -1).mean(1)), 1)


def brain_pair(seed, shape=(9, 11, 2 * BATCH + 3)):
    rng = np.random.default_rng(seed)
    truth, image = rng.random((2, *shape)).astype(np.float32)
    truth[:2] = truth[:, :, -3:] = 0
    orientation = Orientation((1, 0, 2), (True, False, False))  # the file's axes: anterior-posterior first
    return Pair("model", "t1", image, truth, None, truth > 0, orientation)


def test_slices_in_three_planes_and_volumes(files):
    networks = Networks(**files)
    everything = {name: ([], []) for name in ("axial", "coronal", "sagittal", "volume")}
    for seed in range(3):
        pair = brain_pair(seed)
        networks.next_subject()
        networks.add("1", pair, first=True)
        upright = [x.transpose(1, 0, 2)[::-1] for x in (pair.image, pair.truth)]
        for plane, axis in (("axial", 2), ("coronal", 1), ("sagittal", 0)):
            shown = np.moveaxis(upright[1], axis, 0).any(axis=(1, 2))
            for part, x in zip(everything[plane], upright, strict=True):
                part.append(moments(np.moveaxis(x, axis, 0)[shown]))
        for part, x in zip(everything["volume"], upright, strict=True):
            part.append(moments(x.transpose(2, 0, 1)[None]))
        slices = [np.moveaxis(x, 2, 0)[: 2 * BATCH] for x in upright]
        assert networks.distances(pair)["lpips"] == pytest.approx(np.abs(slices[0] - slices[1]).mean(), rel=1e-5)
    row = networks.summary()["1"]["model"]
    expected = {
        name: frechet_distance(*(gaussian(np.concatenate(part)) for part in parts))
        for name, parts in everything.items()
    }
    assert row["planes"] == pytest.approx({name: expected[name] for name in row["planes"]}, rel=1e-3)
    assert row["fid"] == pytest.approx(np.mean([expected[n] for n in ("axial", "coronal", "sagittal")]), rel=1e-3)
    assert row["fvd"] == pytest.approx(expected["volume"], rel=1e-3) and row["volumes"] == 3
    assert row["slices"] == sum(len(np.concatenate(everything[n][0])) for n in ("axial", "coronal", "sagittal"))


def test_a_heart_shows_its_missing_slices(files):
    rng = np.random.default_rng(0)
    truth, image = rng.random((2, 8, 8, 12)).astype(np.float32)
    networks = Networks(files["fid"])
    pair = Pair("model", "sax", image, truth, (4, 5, 6))
    networks.add("1", pair, first=True)
    (row,) = networks.summary()["1"].values()
    a, b = (moments(np.moveaxis(x[..., 4:7], 2, 0)) for x in (image, truth))
    assert row["planes"] == pytest.approx({"axial": frechet_distance(gaussian(a), gaussian(b))}, rel=1e-3)
    assert row["slices"] == 3 and "fvd" not in row and networks.distances(pair) == {}


class Dangerous:
    """What a pickle can do to whoever reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


def zipped_pickle(path, bomb):
    """A file of `torch.export.save` whose weights are a pickle, which its reader unpickles."""
    example = (torch.rand(4, 3, 6, 5),)
    torch.export.save(torch.export.export(Moments(), example), path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, pickle.dumps(bomb) if name.endswith((".pt", ".pkl", "weights")) else content)


def plain_pickle(path, bomb):
    path.write_bytes(pickle.dumps(bomb))


@pytest.mark.parametrize("name", ["fid.pt2", "fid.pt"])
@pytest.mark.parametrize("write", [zipped_pickle, lambda p, x: torch.save(x, p), plain_pickle])
def test_no_file_of_a_network_is_unpickled(tmp_path, name, write):
    write(tmp_path / name, Dangerous(tmp_path / "victim"))
    with pytest.raises(CopeditError, match=r"--fid-network .*fid.*: not a TorchScript file"):
        Networks(tmp_path / name)
    assert not (tmp_path / "victim").exists()


class Writes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "written-by-a-network")
        return x


class Reads(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_file("written-by-a-network", True, 1)


@pytest.mark.parametrize(("module", "word"), [(Writes, "save"), (Reads, "from_file")])
def test_a_network_that_works_with_files_is_refused(tmp_path, module, word):
    path = saved(tmp_path / "fid.pt", module())
    with pytest.raises(CopeditError, match=f"its code calls {word}, which works with files"):
        Networks(path)


def test_no_code_of_ours_can_unpickle():
    """Nothing here calls what reads pickles, but for weights as they were published, and of those tensors alone."""
    root = Path(__file__).parents[3]
    packages = ["copedit_rt", *(f"{folder}/copedit_{folder}" for folder in ("kernels", "training", "bench"))]
    sources = [path for package in packages for path in (root / package).rglob("*.py")]
    assert len(sources) > 100
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "np.load":
                    assert "allow_pickle=False" in ast.unparse(node), path
                if called == "torch.load":
                    assert path.name == "networks.py" and "weights_only=True" in ast.unparse(node), path
                assert called not in ("torch.export.load", "eval", "exec"), path


def test_what_is_no_network(files, tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"not a network")
    with pytest.raises(CopeditError, match=r"--fid-network .*weights.pt: not a TorchScript"):
        Networks(tmp_path / "weights.pt")
    with pytest.raises(CopeditError, match=r"--fvd-network .*none.pt: no such file"):
        Networks(fvd=tmp_path / "none.pt")
    with pytest.raises(CopeditError, match=r"--lpips-network .* cannot take"):
        Networks(lpips=files["fid"]).distances(brain_pair(0))


def test_the_command_with_networks(files, model_folder, tmp_path):
    options = [x for name, path in files.items() for x in (f"--{name}-network", str(path))]
    command = ["evaluate", "--model", str(model_folder("demo-brain")), "-o", str(tmp_path), "--subjects", "2"]
    result = CliRunner().invoke(app, [*command, "--patterns", "1", "--samples", "2", *options])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(found["frechet"]["2"]) == set(found["by_count"]["2"])
    assert all(row["fid"] >= 0 and row["fvd"] is not None for row in found["frechet"]["1"].values())
    assert "lpips" in found["by_count"]["1"]["model"] and found["calibration"]["voxels"] > 0
    assert found["samples"] == 2 and (tmp_path / "frechet.png").exists() and (tmp_path / "calibration.png").exists()
    text = (tmp_path / "evaluation.md").read_text()
    assert "FID: network fid.pt." in text and "2 samples" in text
