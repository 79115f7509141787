"""The exported repository in the real Triton Inference Server, asked by the client that is shipped and by its own."""

import json
import shutil
import threading

import numpy as np
import pytest
from small import BRAIN, GRID, HEART, study, write
from triton_server import STATUS, missing, serving

from copedit_rt import Study, Synthesizer, TritonClient
from copedit_rt.client import ServerError
from copedit_rt.engines import server_export
from copedit_rt.errors import CopeditError

if missing():
    pytest.skip(missing(), allow_module_level=True)
http = pytest.importorskip("tritonclient.http", reason="needs the extra triton")
grpc = pytest.importorskip("tritonclient.grpc", reason="needs the extra triton")

FOLDERS = {"tiny-brain": "brain", "tiny-heart": "heart"}


@pytest.fixture(scope="module")
def server(brain, heart, tmp_path_factory):
    """Ports, and the status of every model: a repository of a brain and a heart, whose exports other tests share."""
    scratch = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in ((BRAIN.name, brain), (HEART.name, heart)):
            copied = lambda model, output, precision, f=folder: shutil.copytree(f, output, dirs_exist_ok=True)  # noqa: E731
            patch.setattr(server_export, "export_onnx", copied)
            server_export.export_triton(folder, scratch / name, "python", max_batch=2)
            shutil.copytree(scratch / name, scratch / "repository", dirs_exist_ok=True)
    with serving(scratch / "repository", scratch) as (web, remote, log):
        yield {"http": f"http://127.0.0.1:{web}", "grpc": f"grpc://127.0.0.1:{remote}"}, dict(STATUS.findall(log))


def test_every_model_is_ready(server):
    parts = ("encoder", "step", "decoder", "study")
    assert server[1] == {f"{name}-{part}": "READY" for name in FOLDERS for part in parts}


@pytest.mark.parametrize("way", ["http", "grpc"])
@pytest.mark.parametrize("config", [BRAIN, HEART], ids=lambda config: config.name)
def test_a_study_in_one_request_is_that_of_onnxruntime(server, config, way, request, tmp_path):
    folder = write(study(config, "t1", "flair"), tmp_path)
    given = Study.read(folder) if config is BRAIN else Study.read({"sax": next(folder.iterdir())})
    options = {"steps": 3, "seed": 7, "solver": "dpm2m"}
    here = Synthesizer.load(request.getfixturevalue(FOLDERS[config.name]), engine="onnxruntime")
    expected = here.synthesize(given, **options)
    client = TritonClient(server[0][way], config.name)
    assert client.ready()
    found = client.synthesize(given, **options)
    assert found.study.synthetic == expected.study.synthetic
    for name in expected.study.synthetic:
        assert np.array_equal(found.study.volumes[name].data, expected.study.volumes[name].data), name
        assert expected.study.volumes[name].data.std() > 0.01
    assert found.perception == expected.perception and found.study.notes == expected.study.notes
    differing = {name for name in expected.record if found.record[name] != expected.record[name]}
    assert differing == {"engine", "versions"} and found.record["engine"] == "triton (python)"
    paths = [result.study.write(tmp_path / name, model="x") for name, result in (("a", found), ("b", expected))]
    assert [path.read_bytes() for path in paths[0]] == [path.read_bytes() for path in paths[1]]


def test_samples_targets_and_defaults(server, brain):
    here, client = Synthesizer.load(brain, engine="onnxruntime"), TritonClient(server[0]["grpc"], BRAIN.name)
    given = study(BRAIN, "t2")
    options = {"samples": 3, "target": ["flair"], "steps": 1}
    expected, found = here.synthesize(given, **options), client.synthesize(given, **options)
    # More samples than the server joins: batches of another size than here, which may differ by rounding.
    mine, other = ([x.study.volumes["flair"].data, x.std["flair"]] for x in (found, expected))
    np.testing.assert_allclose(mine, other, atol=1e-5)
    assert found.study.synthetic == {"flair"} and list(found.std) == ["flair"]
    # Nothing but images and an affine.
    with grpc.InferenceServerClient(server[0]["grpc"].removeprefix("grpc://")) as plain:
        answer = plain.infer("tiny-brain-study", [tensor(grpc, "t2", given), tensor(grpc, "affine", GRID[None])])
    assert json.loads(answer.as_numpy("about")[0])["record"]["sampler"] == {
        "method": "ddim", "steps": 4, "seed": 0, "samples": 1
    }  # fmt: skip
    given.name = "study"
    alike = here.synthesize(given)
    for name, image in zip(answer.as_numpy("elements"), answer.as_numpy("images"), strict=True):
        assert np.array_equal(image, alike.study.volumes[name.decode()].data)
    assert len(answer.as_numpy("elements")) == 3 and answer.as_numpy("deviation").shape[0] == 0


def tensor(library, name, value):
    array = np.ascontiguousarray(value.volumes[name].data if isinstance(value, Study) else value)
    kind = {"f4": "FP32", "f8": "FP64", "i4": "INT32", "O": "BYTES"}[array.dtype.str.lstrip("<|")]
    made = library.InferInput(name, list(array.shape), kind)
    made.set_data_from_numpy(array)
    return made


def test_two_clients_at_once(server, brain):
    given = [study(BRAIN, "t1"), study(BRAIN, "t1ce", "t2")]
    here = Synthesizer.load(brain, engine="onnxruntime")
    expected = [here.synthesize(one, steps=20, seed=i) for i, one in enumerate(given)]
    found, together = [None, None], threading.Barrier(2)

    def ask(i: int) -> None:
        client = TritonClient(server[0][("http", "grpc")[i]], BRAIN.name)
        together.wait()
        found[i] = client.synthesize(given[i], steps=20, seed=i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for mine, other in zip(found, expected, strict=True):
        assert mine.study.synthetic == other.study.synthetic
        for name in other.study.synthetic:
            assert np.array_equal(mine.study.volumes[name].data, other.study.volumes[name].data)


IMAGE = np.random.default_rng(0).random((16, 16, 8), np.float32) + 0.1
NAN = np.where(np.arange(IMAGE.size).reshape(IMAGE.shape) == 777, np.nan, IMAGE).astype(np.float32)
EVERY = dict.fromkeys(BRAIN.elements, IMAGE)
WORDS = np.array([b"t9"], object)


@pytest.mark.parametrize("way", ["http", "grpc"])
@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"t1": IMAGE[0]}, r"unexpected shape for input 't1'"),
        ({"t1": IMAGE[:1]}, r"t1 is a 2-D image \(1 x 16 x 8\); a 3-D volume is needed"),
        ({"t1": IMAGE, "t2": IMAGE[:, :12]}, "the files are on different grids, t1"),
        ({"t1": NAN}, "1 voxels of t1 are NaN or infinite; set them to 0"),
        ({"t1": np.zeros_like(IMAGE)}, "every voxel of t1 is 0, so it shows nothing"),
        ({}, "expected images of a brain"),
        (EVERY, "no element is missing: t1, t1ce, t2, flair are all there"),
        ({"t1": IMAGE, "affine": np.zeros((1, 4, 4))}, "affine"),
        ({"t1": IMAGE, "affine": GRID[None].repeat(3, 0)}, "3 affines for 1 images; send one for all"),
        ({"t1": IMAGE, "target": WORDS}, "target 't9' is unknown to tiny-brain"),
        ({"t1": IMAGE, "steps": np.array([-1], np.int32)}, "steps -1: must be at least 0"),
        ({"t1": IMAGE, "steps": np.array([0], np.int32)}, "steps 0: must be between 1 and"),
        ({"t1": IMAGE, "detail": WORDS}, "detail 't9' is unknown; choose one of guided, none"),
        ({"t1": IMAGE, "study": np.array([b"\xff"], object)}, "study: no text in UTF-8"),
        ({"t1": IMAGE, "study": np.array([b"a\nb"], object)}, "study: a name of 1 to 200 printable characters"),
        ({"t1": IMAGE, "pd": IMAGE}, "pd"),
        ({"t1": IMAGE, "sax": IMAGE}, "sax"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:24],
)
def test_a_bad_request_is_refused_in_one_sentence(server, way, inputs, sentence):
    library = {"http": http, "grpc": grpc}[way]
    given = {"affine": GRID[None], **inputs}
    with library.InferenceServerClient(server[0][way].removeprefix(f"{way}://")) as client:
        with pytest.raises(library.InferenceServerException, match=sentence) as told:
            client.infer("tiny-brain-study", [tensor(library, name, value) for name, value in given.items()])
        assert "\n" not in told.value.message().strip() and "Traceback" not in told.value.message()
        assert "/" not in told.value.message(), "no path of the server"
        assert client.is_model_ready("tiny-brain-study")


def test_the_client_tells_what_it_cannot_do(server, monkeypatch):
    given = study(BRAIN, "t1")
    for address in server[0].values():
        with pytest.raises(ServerError, match="must be between 1 and 500") as told:
            TritonClient(address, BRAIN.name).synthesize(given, steps=501)
        assert told.value.status == 400
        with pytest.raises(CopeditError, match="nothing-study"):
            TritonClient(address, "nothing").synthesize(given)
        with pytest.raises(CopeditError, match="target: the model tiny-heart-study takes no such option"):
            TritonClient(address, HEART.name).synthesize(study(HEART), target=["t1"])
        with pytest.raises(CopeditError, match="no answer from"):
            TritonClient(address, BRAIN.name, seconds=0.5).synthesize(given, steps=500)
        assert TritonClient(address, BRAIN.name).synthesize(given, steps=1).study.synthetic, "it goes on"
    for address in ("http://127.0.0.1:9", "grpc://127.0.0.1:9"):
        client = TritonClient(address, BRAIN.name)
        assert not client.ready()
        with pytest.raises(CopeditError, match=f"no answer from {address} .*is the server running"):
            client.synthesize(given)
    with pytest.raises(CopeditError, match="expected an address such as"):
        TritonClient("127.0.0.1:8000", BRAIN.name)
