"""What the client of Triton Inference Server says without one; with one: engines/test_triton_server.py."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

import copedit_rt
from copedit_rt import Study, TritonClient
from copedit_rt.errors import CopeditError
from copedit_rt.images.nifti import Volume


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_the_extra_is_named(monkeypatch, way):
    monkeypatch.setitem(sys.modules, f"tritonclient.{way}", None)
    with pytest.raises(CopeditError, match=r"^TritonClient: .*; pip install 'copedit\[triton\]'$"):
        TritonClient(f"{way}://127.0.0.1:8001", "brain-2mm")


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "https://127.0.0.1:8000", "grpc://", "http://[::1", ""])
def test_what_is_no_address(address):
    with pytest.raises(CopeditError, match="expected an address such as http:"):
        TritonClient(address, "brain-2mm")


def test_images_go_in_the_order_of_the_model(monkeypatch):
    """Else its affines would be those of other images: one that lies mirrored in its file would come out mirrored."""
    sent: dict[str, np.ndarray] = {}

    class Input:
        def __init__(self, name: str, shape: list[int], kind: str) -> None:
            self.name = name

        def set_data_from_numpy(self, array: np.ndarray) -> None:
            sent[self.name] = array

    def infer(*given: object, **options: object) -> None:
        raise RuntimeError("enough")

    library = SimpleNamespace(
        InferenceServerClient=lambda *given, **options: SimpleNamespace(infer=infer),
        InferInput=Input,
        InferRequestedOutput=str,
    )
    monkeypatch.setitem(sys.modules, "tritonclient.http", library)
    client = TritonClient("http://127.0.0.1:8000", "brain-2mm")
    inputs = ("t1", "t2", "affine", "seed", "samples", "study")
    monkeypatch.setattr(client, "_kinds", lambda: dict.fromkeys(inputs, "FP32"))
    monkeypatch.setattr("copedit_rt.triton_client._array", lambda value, kind: np.zeros(1))
    data = np.random.default_rng(0).random((8, 8, 8), np.float32)
    affine, mirrored = np.diag([3.0, 3.0, 3.0, 1.0]), np.diag([-3.0, 3.0, 3.0, 1.0])
    mirrored[0, 3] = 21.0
    volumes = {"t2": Volume.from_array(data, mirrored), "t1": Volume.from_array(data, affine)}
    with pytest.raises(CopeditError, match="enough"):
        client.synthesize(Study.of(volumes))
    assert sent["affine"][:, 0, 0].tolist() == [3.0, -3.0] and set(sent) >= {"t1", "t2"}


def test_nothing_of_grpc_is_waited_for_longer(monkeypatch):
    asked: list[object] = []

    class Server:
        def __init__(self, address: str) -> None:
            pass

        def is_model_ready(self, model: str, client_timeout: float) -> bool:
            asked.append(client_timeout)
            return True

        def get_model_metadata(self, model: str, client_timeout: float) -> SimpleNamespace:
            asked.append(client_timeout)
            return SimpleNamespace(inputs=[SimpleNamespace(name="t1", datatype="FP32")])

    monkeypatch.setitem(sys.modules, "tritonclient.grpc", SimpleNamespace(InferenceServerClient=Server))
    client = TritonClient("grpc://127.0.0.1:8001", "brain-2mm", seconds=2)
    assert client.ready() and client._kinds() == {"t1": "FP32"} and asked == [2, 2]


def test_it_is_public():
    assert "TritonClient" in copedit_rt.__all__ and dir(copedit_rt).count("TritonClient") == 1
