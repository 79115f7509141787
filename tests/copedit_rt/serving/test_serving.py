"""The service over real HTTP, in a thread of the test's process and once in a process of its own."""

import email
import errno
import http.server
import json
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from commands import SHORT_AXIS, files, image, refused, run, save, slices, study
from small import BRAIN

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("multipart", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

from serving import get, members, part, post, process, served, zipped

from copedit_rt import archive, terminal
from copedit_rt.archive import safe_name
from copedit_rt.client import Client, ServerError
from copedit_rt.cohort import Job
from copedit_rt.errors import CopeditError, Stopped
from copedit_rt.serving import server
from copedit_rt.serving.app import Limits
from copedit_rt.serving.asked import Refused, public
from copedit_rt.serving.desk import Desk, where
from copedit_rt.terminal import secret


@pytest.fixture(scope="module")
def house(brain_model, heart_model, tmp_path_factory):
    """A service with a model for each task: port, scratch folder, log."""
    scratch = tmp_path_factory.mktemp("scratch")
    with served([brain_model, heart_model], scratch, size=1 << 21) as (_, port, log):
        yield port, scratch, log


@pytest.fixture
def case(tmp_path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(study(tmp_path / "in").iterdir())}


def timeless(found: dict[str, bytes]) -> dict[str, bytes]:
    """Of sidecars not when the input's file was written, as the server's own copies are younger."""
    return {name: re.sub(rb'"size_mtime_ns": \[[^]]*]', b"", content) for name, content in found.items()}


def expected(tmp_path: Path, model: Path, *options: object) -> dict[str, bytes]:
    assert run("synth", "-o", tmp_path / "out", "--model", model, *options).exit_code == 0
    return timeless({name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")})


def sent(files: dict[str, bytes]) -> list[bytes]:
    return [part("file", content, name) for name, content in files.items()]


def test_answers_are_what_the_command_writes(house, case, tmp_path, brain_model):
    port, scratch, _ = house
    wanted = expected(tmp_path, brain_model, tmp_path / "in", "--steps", 3, "--seed", 7, "--samples", 2, "--preview")
    fields = [part("steps", "3"), part("seed", "7"), part("samples", "2"), part("preview", "true")]
    status, content, headers = post(port, "/v1/synth", *fields, *sent(case))
    assert status == 200 and headers["content-type"] == "application/zip"
    assert timeless(members(content)) == wanted and len(wanted) == 4
    assert not list(scratch.iterdir())
    status, content, headers = post(port, "/v1/synth", *fields, *sent(case), Accept="multipart/mixed")
    message = email.message_from_bytes(f"Content-Type: {headers['content-type']}\r\n\r\n".encode() + content)
    assert status == 200
    parts = {p.get_filename(): p.get_payload(decode=True).removesuffix(b"\r\n") for p in message.get_payload()}
    assert timeless(parts) == wanted


def test_modalities_zips_and_hearts(house, case, tmp_path, brain_model, heart_model):
    port, _, _ = house
    one, _, three = (tmp_path / "in" / f"case_{e}.nii.gz" for e in ("t1", "t2", "flair"))
    wanted = expected(tmp_path / "a", brain_model, "--t1", one, "--flair", three)
    status, content, _ = post(
        port, "/v1/synth", part("t1", one.read_bytes(), one.name), part("FLAIR", three.read_bytes(), three.name)
    )
    assert status == 200 and timeless(members(content)) == wanted
    packed = zipped({f"deep/{name}": content for name, content in case.items()})
    status, content, _ = post(port, "/v1/synth", part("file", packed, "case.ZIP"))
    assert status == 200 and list(members(content)) == ["deep/case_t1ce.json", "deep/case_t1ce.nii.gz"]
    stack = slices(20, 12)
    stack[..., 4] = 0
    heart = save(tmp_path / "patient001_frame01.nii.gz", stack, SHORT_AXIS)
    wanted = expected(tmp_path / "h", heart_model, heart, "--missing-slices", "5-6")
    sax = part("sax", heart.read_bytes(), heart.name)
    status, content, _ = post(port, "/v1/synth", sax, part("missing_slices", "5-6"))
    assert status == 200 and timeless(members(content)) == wanted


def test_the_client(house, case, tmp_path, brain_model):
    port, _, _ = house
    client = Client(f"http://127.0.0.1:{port}")
    paths = sorted((tmp_path / "in").iterdir())
    wanted = expected(tmp_path / "a", brain_model, tmp_path / "in", "--steps", 1, "--target", "t1ce")
    made = client.synth(paths, tmp_path / "made", steps=1, target=["t1ce"], model="tiny-brain", solver=None)
    assert timeless(made) == wanted
    assert made == {n: (tmp_path / "made" / n).read_bytes() for n in files(tmp_path / "made")}
    report = client.inspect({"t1": paths[1], "t2": paths[2]})
    shown = run("inspect", f"--t1={paths[1]}", f"--t2={paths[2]}", "--model", brain_model, "--json")
    assert [report] == json.loads(shown.stdout)["studies"]
    with pytest.raises(ServerError, match="known are") as refused:
        client.synth(paths, stpes=3)
    assert refused.value.status == 400
    with pytest.raises(CopeditError, match="no/such"):
        client.synth({"t1": "no/such.nii"})
    with pytest.raises(CopeditError, match="is copedit serve running"):
        Client("http://127.0.0.1:1").inspect(paths)
    for address in ("127.0.0.1:80", "http://HOST:PORT", "http://a..b:80", "http://127.0.0.1/ü"):
        with pytest.raises(CopeditError, match="expected an address"):
            Client(address)


def test_what_the_client_cannot_send_is_told_in_a_sentence(tmp_path):
    for token in ("s3cret\nX-Other: 1", "s3crét"):
        with pytest.raises(CopeditError, match="the token holds") as told:
            Client("http://127.0.0.1:1", token)
        assert "s3cr" not in str(told.value)
    with pytest.raises(CopeditError, match="tries 0"):
        Client("http://127.0.0.1:1", tries=0)
    odd = tmp_path / os.fsdecode(b"\xff.nii")
    odd.write_bytes(b"")
    with pytest.raises(CopeditError, match="is copedit serve running"):
        Client("http://127.0.0.1:1").inspect([odd], name=odd.stem)


@pytest.mark.parametrize("error", [ServerError("no", 503), Stopped("no", 15), Refused("no", 503, 2)])
def test_errors_come_back_from_other_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == "no" and vars(again) == vars(error)


def hostile(case: dict[str, bytes]) -> list[tuple[int, list[bytes], str]]:
    """What is sent, and the status and words of the answer."""
    good = sent(case)
    t1, t2 = case["case_t1.nii.gz"], case["case_t2.nii.gz"]
    bomb = zipped({"case_t1.nii.gz": bytes(50 << 20)})
    return [
        (400, [], "no file was sent"),
        (400, [*good, part("steps", "-1")], "the field steps -1"),
        (422, [*good, part("steps", "0")], "steps 0: must be between 1 and"),
        (400, [*good, part("steps", "9" * 4000)], "the field steps"),
        (400, [*good, part("seed", "-1")], "the field seed"),
        (400, [*good, part("detail", "yes")], "the field detail yes"),
        (400, [*good, part("model", "/etc/passwd")], "is not served here"),
        (400, [*good, part("model", "../../weights")], "is not served here"),
        (400, [*good, part("output", "/tmp/x")], "'output' is unknown"),
        (400, [*good, part("missing_slices", ",".join(["0-32767"] * 8))], "the field missing_slices 0-32767"),
        (400, [*good, part("seed", "1"), part("seed", "2")], "twice"),
        (400, [part("swi", t1, "a.nii.gz")], "swi"),
        (400, [part("t1", t1, "a.nii.gz"), part("file", t2, "b_t2.nii.gz")], "either all as file"),
        (400, [part("t1", t1, "a.nii.gz"), part("T1w", t2, "b.nii.gz")], "two files for t1"),
        (400, [part("t1", t1, "a" * 300 + ".nii.gz")], "too long"),
        (400, [part("file", b"x" * 100)], "unknown"),
        (413, [part("steps", "1" * 70_000), *good], ""),
        (413, [part("file", bomb, "bomb.zip")], "larger, unpacked"),
        (413, [part("file", os.urandom(3 << 20), "a_t1.nii")], "larger"),
        (422, [part("file", zipped({"../../../escaped_t1.nii.gz": t1[:500]}), "a.zip")], "escaped_t1.nii.gz"),
        (422, [part("file", b"PK\x03\x04 nothing", "a.zip")], "the zip is damaged"),
        (422, [part("file", t1[:300], "case_t1.nii.gz")], "case_t1.nii.gz is"),
        (422, [part("file", b"", "case_t1.nii.gz")], "case_t1.nii.gz is an empty file"),
        (422, [part("file", b"hello" * 200, "../../etc/case_t1.nii.gz")], "case_t1.nii.gz is not a NIfTI file"),
        (422, [part("file", t1, "mystery.nii.gz")], "mystery.nii.gz"),
        (422, [part("t1", t1, "case.txt")], "expected a NIfTI file"),
        (422, [*good, part("file", t1, "other_t1.nii.gz")], "2 studies"),
        (422, [*good, part("target", "t1")], "the field target t1"),
        (422, [*good, part("target", "pd")], "pd"),
        (422, [*good, part("solver", "euler")], "euler"),
        (422, [*good, part("missing_slices", "3")], "cardiac"),
        (422, [*good, part("select", "run-9")], "run-9"),
        (422, [*good, part("file", t1, "case_t1ce.nii.gz")], "no element is missing"),
    ]


def test_whatever_is_sent_is_answered_in_a_sentence(house, case, tmp_path):
    port, scratch, log = house
    for status, parts, words in hostile(case):
        got, answer, _ = post(port, "/v1/synth", *parts)
        if status == 413 and not words:
            status = 400  # a field is no file
        assert got == status, (answer, words)
        said = answer["error"]
        assert words in said and "\n" not in said and len(said) < 1500, said
        assert str(scratch) not in said and not re.search(r"(?<!\w)/\w+/", said.replace("/v1/", "")), said
        assert "--" not in said and "Traceback" not in said, said
    assert not list(scratch.iterdir()) and not list(scratch.parent.rglob("escaped*"))
    told = "\n".join(log)
    assert "case" not in told and "mystery" not in told and str(scratch) not in told


def test_what_inspect_finds_tells_no_path(house, case):
    port, scratch, _ = house
    parts = sent(case | {"case_t2.nii.gz": case["case_t2.nii.gz"][:300]})
    status, report, _ = post(port, "/v1/inspect", *parts)
    assert status == 200 and not report["consistent"]
    told = [finding["text"] for finding in report["findings"] if finding["kind"] == "unreadable"]
    assert told and told[0].startswith("case_t2.nii.gz is a truncated") and str(scratch) not in json.dumps(report)


def test_broken_bodies_and_other_paths(house, case):
    port, scratch, log = house
    assert post(port, "/v1/synth", *sent(case), end=False)[0] == 400
    assert post(port, "/v1/synth", b"no form at all", end=False)[0] == 400
    assert post(port, "/v1/synth", b"{}", Content_Type="application/json")[0] == 415
    assert get(port, "/v1/synth")[:2] == (405, {"error": "this path takes another method"})
    assert get(port, "/../../etc/passwd")[0] == 404
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(b"POST /v1/synth HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\n")
        assert b" 413 " in raw.recv(1000)
    with socket.create_connection(("127.0.0.1", port)) as raw:
        head = b"Content-Type: multipart/form-data; boundary=edge\r\nContent-Length: 100000\r\n\r\n"
        raw.sendall(b"POST /v1/synth HTTP/1.1\r\nHost: x\r\n" + head + part("file", b"half", "case_t1.nii"))
    for _ in range(100):  # who goes away leaves nothing, and is no failure of the server
        if not list(scratch.iterdir()) and log[-1].split()[3] == "499":
            break
        time.sleep(0.05)
    assert not list(scratch.iterdir()) and get(port, "/health")[0] == 200
    assert log[-1].split()[3] == "499" and not any("ClientDisconnect" in line for line in log)


def test_chunks_are_counted(house):
    port, _, _ = house
    with socket.create_connection(("127.0.0.1", port)) as raw:
        head = b"Content-Type: multipart/form-data; boundary=edge\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw.sendall(b"POST /v1/synth HTTP/1.1\r\nHost: x\r\n" + head)
        piece = part("file", b"", "case_t1.nii").removesuffix(b"\r\n")
        raw.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
        for _ in range(48):
            raw.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
        raw.sendall(b"0\r\n\r\n")
        assert b" 413 " in raw.recv(1000)


def test_health_and_metrics(house, case):
    port, _, _ = house
    status, said, _ = get(port, "/ready")
    assert status == 200 and said == {"status": "ready", "models": ["tiny-brain", "tiny-heart"]}
    assert get(port, "/health")[1]["status"] == "alive"
    before = numbers(port)
    assert post(port, "/v1/synth", *sent(case))[0] == 200
    assert post(port, "/v1/synth")[0] == 400
    after = numbers(port)
    ok, bad = ('copedit_requests_total{path="/v1/synth",status="%d"}' % s for s in (200, 400))  # noqa: UP031
    assert after[ok] == before.get(ok, 0) + 1 and after[bad] == before.get(bad, 0) + 1
    for stage in ("upload", "wait", "read", "compute", "write"):
        name = f'copedit_stage_seconds_count{{stage="{stage}"}}'
        assert after[name] >= before[name] + 1
    assert after["copedit_queue"] == 0 and after["process_resident_memory_bytes"] > 1e6


def numbers(port: int) -> dict[str, float]:
    lines = get(port, "/metrics")[1].decode().splitlines()
    return {name: float(value) for name, _, value in (li.rpartition(" ") for li in lines if not li.startswith("#"))}


def test_the_queue_is_limited(brain_model, case, tmp_path, monkeypatch):
    go, real = threading.Event(), Job.compute
    monkeypatch.setattr(Job, "compute", lambda *given: go.wait(60) and real(*given))
    with served([brain_model], tmp_path / "scratch", queue=3) as (service, port, _):
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(post(port, "/v1/synth", *sent(case))[0])) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 30
        while service._inside < 3 and time.monotonic() < until:
            time.sleep(0.01)
        status, answer, headers = post(port, "/v1/synth", *sent(case))
        assert status == 503 and "wait already" in answer["error"] and int(headers["retry-after"]) >= 1
        answers = []
        patient = Client(f"http://127.0.0.1:{port}", tries=20)
        late = threading.Thread(target=lambda: answers.append(patient.synth(sorted((tmp_path / "in").iterdir()))))
        late.start()
        time.sleep(0.3)
        go.set()
        for thread in [*threads, late]:
            thread.join(60)
        assert statuses == [200] * 3 and list(answers[0]) == ["case_t1ce.json", "case_t1ce.nii.gz"]
    assert not list((tmp_path / "scratch").iterdir())


def test_the_time_is_limited(brain_model, case, tmp_path, monkeypatch):
    """Between steps; and the folder of what was given up goes when its thread notices."""
    from copedit_rt.engines.torch_engine import TorchEngine

    real = TorchEngine.sample

    def slowly(self, z, prompts, observed, steps, solver, progress=None, prior=None):
        for done in range(200):
            time.sleep(0.02)
            if progress:
                progress(done, 200)
        return real(self, z, prompts, observed, steps, solver, None, prior)

    with served([brain_model], tmp_path / "scratch", seconds=0.7) as (service, port, _):
        monkeypatch.setattr(TorchEngine, "sample", slowly)
        start = time.monotonic()
        status, answer, _ = post(port, "/v1/synth", *sent(case))
        assert status == 504 and "longer than this server allows" in answer["error"]
        assert time.monotonic() - start < 3
        until = time.monotonic() + 10
        while service._inside and time.monotonic() < until:
            time.sleep(0.02)
        assert not list((tmp_path / "scratch").iterdir())


def test_images_are_counted_as_they_will_be_in_memory(house, case, tmp_path):
    """Resampled, all get as large as the first; and what `inspect` compares, it resamples."""
    port, _, _ = house
    large = save(tmp_path / "large.nii.gz", image(grid=(60, 60, 60))).read_bytes()
    parts, resample = sent(case | {"case_t1.nii.gz": large}), part("resample", "true")
    assert post(port, "/v1/synth", *parts)[0] == 422
    for path, more in (("synth", [resample]), ("inspect", [])):
        status, answer, _ = post(port, f"/v1/{path}", *parts, *more)
        assert status == 413 and "its images take 2 MiB in memory" in answer["error"]
    assert post(port, "/v1/synth", *sent(case | {"case_flair.nii.gz": large}), resample)[0] == 200


def test_a_full_disk_is_the_servers_fault(house, case, monkeypatch):
    port, _, log = house
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(archive, "write", lambda *given: (_ for _ in ()).throw(full))
    for parts in (sent(case), [part("file", zipped(case), "case.zip")]):
        assert post(port, "/v1/synth", *parts)[0] == 500 and "failed: OSError at" in log[-2]


def test_our_faults_say_nothing_of_the_request(brain_model, case, tmp_path, monkeypatch):
    with served([brain_model], tmp_path / "scratch") as (_, port, log):
        for error in (MemoryError("case_t1"), RuntimeError("secret case_t1 of Jane"), KeyError("case_t1")):
            monkeypatch.setattr(Job, "compute", lambda *given, error=error: (_ for _ in ()).throw(error))
            status, answer, _ = post(port, "/v1/synth", *sent(case))
            assert status == 500 and "this server failed" in answer["error"] and "case" not in answer["error"]
        (mark,) = re.findall(r"by the mark (\w+)", answer["error"])
        assert any(mark in line and "KeyError at test_serving.py" in line for line in log)
        assert "case" not in "".join(log) and "Jane" not in "".join(log)
        name = 'copedit_failures_total{kind="RuntimeError"}'
        assert numbers(port)[name] == 1


def test_a_token(brain_model, case, tmp_path):
    with served([brain_model], tmp_path / "scratch", token="s3cret") as (_, port, _log):
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "s3cret"}):
            status, answer, told = post(port, "/v1/synth", *sent(case), **headers)
            assert status == 401 and "token" in answer["error"] and told["www-authenticate"] == "Bearer"
            assert get(port, "/metrics", **headers)[0] == 401 and get(port, "/health")[0] == 200
        assert post(port, "/v1/synth", *sent(case), Authorization="Bearer s3cret")[0] == 200
        paths = sorted((tmp_path / "in").iterdir())
        assert Client(f"http://127.0.0.1:{port}", "s3cret\n").synth(paths)


def test_a_token_of_the_environment_is_read_as_one_of_a_file(monkeypatch):
    monkeypatch.setenv("COPEDIT_TOKEN", "s3cret\n")
    assert secret(None) == "s3cret"
    monkeypatch.setenv("COPEDIT_TOKEN", "two words")
    with pytest.raises(CopeditError, match="COPEDIT_TOKEN holds no token"):
        secret(None)


def test_as_a_process(brain_model, case, tmp_path):
    """The command: a free port, a token from the environment, a clean end that finishes what runs."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    options = ["--model", brain_model, "--device", "cpu", "--scratch", scratch]
    wanted = expected(tmp_path, brain_model, tmp_path / "in", "--steps", 40)
    with process(*options, COPEDIT_TOKEN="s3cret") as (server, address):
        client, paths = Client(address, "s3cret"), sorted((tmp_path / "in").iterdir())
        client.wait()
        answers: list[dict[str, bytes]] = []
        thread = threading.Thread(target=lambda: answers.append(client.synth(paths, steps=40)))
        thread.start()
        while not list(scratch.rglob("*.nii.gz")):
            time.sleep(0.001)
        server.send_signal(signal.SIGTERM)
        thread.join(60)
        assert [timeless(answer) for answer in answers] == [wanted]
        _, told = server.communicate(timeout=60)
        assert server.returncode == 0 and told.splitlines()[-1] == "copedit: the server has ended"
        assert not list(scratch.iterdir()) and "case" not in told and "s3cret" not in told


def test_scratch_is_for_all_files_and_what_a_killed_server_left_there_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    scratch = tmp_path / "new" / "scratch"
    left = scratch / f".copedit.{'0' * 16}.parts"
    (left / "in").mkdir(parents=True)
    left.with_suffix(".part").touch()
    server.open_scratch(scratch)
    assert not list(scratch.iterdir()) and tempfile.gettempdir() == str(scratch)


def test_quiet_hides_no_fault(monkeypatch):
    given: dict[str, Any] = {}
    monkeypatch.setattr(server, "serve", lambda **options: given.update(options))
    assert run("serve", "-q").exit_code == 0
    assert given["say"] is terminal.nothing and given["warn"] is terminal.tell


def test_a_log_that_cannot_be_written_costs_nothing():
    def full(text: str) -> None:
        raise OSError(errno.ENOSPC, text)

    nowhere = {"host": "203.0.113.9", "port": 1, "models": ["demo-brain"], "devices": ["cpu"]}
    with pytest.raises(CopeditError, match="cannot listen"):  # after it has warned that no token is set
        server.serve(**nowhere, token=None, scratch=None, limits=Limits(), grace=1, say=full, warn=full)


def test_told_to_end_it_loads_no_more_models(brain_model):
    desk = Desk([str(brain_model)], ["cpu"])
    desk.closing = True
    desk.warm()
    assert not desk.ready
    desk.close()


@pytest.fixture
def proxy():
    """Something before the server: a date as Retry-After at first, then a page; /ready is never answered."""

    class Handler(http.server.BaseHTTPRequestHandler):
        asked = 0

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            Handler.asked += 1
            self.send_response(503 if Handler.asked == 1 else 200)
            self.send_header("Retry-After", "Wed, 21 Oct 2026 07:28:00 GMT")
            self.end_headers()
            self.wfile.write(b"<html>")

        def do_GET(self) -> None:
            threading.Event().wait(3)

        def log_message(self, *said: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_the_client_behind_a_proxy(proxy, case, tmp_path, monkeypatch):
    paths, client = sorted((tmp_path / "in").iterdir()), Client(proxy)
    start = time.monotonic()
    with pytest.raises(CopeditError, match=r"not ready after 0\.3 seconds"):
        client.wait(0.3)
    assert time.monotonic() - start < 2
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for ask in (client.synth, client.inspect):
        with pytest.raises(CopeditError, match="is not of copedit serve"):
            ask(paths)
    assert slept == [5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "no-such"], "no-such"),
        (["--device", "tpu", "--model", "demo-brain", "--port", "0"], "tpu"),
        (["--port", "1", "--host", "203.0.113.9"], "cannot listen on 203.0.113.9:1"),
        (["--max-size", "big"], "--max-size big"),
        (["--token-file", "no/such"], "no/such"),
        (["--scratch", __file__], "test_serving.py (File exists); choose another folder with --scratch"),
    ],
)
def test_options_that_do_not_work(options, words):
    done = run("serve", *options)
    assert done.exit_code == 1 and words in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_without_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "copedit_rt.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused(run("serve"), "pip install 'copedit[serve]'")


def test_names_and_sentences(tmp_path):
    assert safe_name("../..") == "_" and safe_name(".hidden") == "hidden" and safe_name("a b\x00c\n") == "a b_c_"
    (tmp_path / "in" / "study").mkdir(parents=True)
    said = f"{tmp_path}/in/study/case_t1.nii is bad (/usr/lib/x.so); use --missing-slices or --file t1=FILE"
    assert public(CopeditError(said), tmp_path) == (
        "case_t1.nii is bad (x.so); use the field missing_slices or the field t1"
    )
    assert where(ValueError("secret")) == "ValueError at "
    assert BRAIN.name == "tiny-brain" and image().any()
