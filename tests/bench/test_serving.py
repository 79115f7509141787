"""A real server under load, with tiny models."""

from contextlib import nullcontext
from io import StringIO
from types import SimpleNamespace

import pytest
from small import BRAIN, HEART, saved

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("multipart", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

from copedit_bench import serving


def test_every_model_gets_its_share_of_the_load(monkeypatch):
    """With five models every request of the fifth one would have been a hostile one."""
    monkeypatch.setattr(serving, "_case", lambda folder, model, steps: serving.Case(model, [folder], {"steps": 1}, {}))
    monkeypatch.setattr(serving, "_hostile", lambda folder, sound: [([sound], {})])
    monkeypatch.setattr(serving, "_server", lambda models, clients: nullcontext("http://nowhere"))
    monkeypatch.setattr(serving, "Client", lambda *_, **__: SimpleNamespace(wait=lambda seconds: None))
    monkeypatch.setattr(serving, "_good", lambda client, case: 1.0)
    monkeypatch.setattr(serving, "_refused", lambda client, files, fields: 400)
    numbers = {"process_cpu_seconds_total": 0.0, "process_resident_memory_bytes": 0.0}
    monkeypatch.setattr(serving, "_numbers", lambda client: numbers)
    report = serving.run("abcde", requests=50, alone=0)
    assert [row["loaded"]["count"] for row in report["models"]] == [8] * 5
    text = serving.markdown(report | {"processor_seconds": 100.0})
    assert "40 of 200, 10 of 400. 2.50 s of processor a study, the refused requests' included." in text


def test_the_server_has_room_for_all_clients(monkeypatch):
    """Beyond its queue requests were tried again without a word, and that was their time."""
    asked = []
    ended = SimpleNamespace(stderr=StringIO("at http://nowhere\n"), terminate=str, wait=int)
    monkeypatch.setattr(serving.subprocess, "Popen", lambda command, **_: asked.extend(command) or ended)
    with serving._server(["a"], 40) as address:
        assert address == "http://nowhere" and int(asked[asked.index("--queue") + 1]) > 40


@pytest.mark.slow
def test_five_hundred_requests(tmp_path):
    """All answered, equal to the command's, memory flat: what each request leaves would show after hundreds."""
    models = [str(saved(config, tmp_path / config.task)) for config in (BRAIN, HEART)]
    report = serving.run(models, alone=20)
    assert sum(report["statuses"].values()) == 500 and report["statuses"]["200"] == 400
    half = len(report["memory"]["samples"]) // 2
    first, second = report["memory"]["samples"][:half], report["memory"]["samples"][half:]
    assert max(second) < 1.1 * max(first) + 2**25
    assert "400 of 200" in serving.markdown(report)
