"""What the client of Triton Inference Server says without one; with one: engines/test_triton_server.py."""

import sys
from types import SimpleNamespace

import pytest

import copedit_rt
from copedit_rt import TritonClient
from copedit_rt.errors import CopeditError


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_the_extra_is_named(monkeypatch, way):
    monkeypatch.setitem(sys.modules, f"tritonclient.{way}", None)
    with pytest.raises(CopeditError, match=r"^TritonClient: .*; pip install 'copedit\[triton\]'$"):
        TritonClient(f"{way}://127.0.0.1:8001", "brain-2mm")


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "https://127.0.0.1:8000", "grpc://", ""])
def test_what_is_no_address(address):
    with pytest.raises(CopeditError, match="expected an address such as http:"):
        TritonClient(address, "brain-2mm")


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
