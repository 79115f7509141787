"""The body of `copedit bench serve`: a real server under load, with what nobody should send among it."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from copedit_bench.machine import describe
from copedit_bench.timing import quantile
from copedit_rt import checkpoint
from copedit_rt.client import Client, ServerError
from copedit_rt.errors import CopeditError
from copedit_rt.images.nifti import Volume
from copedit_rt.task import STACK
from copedit_training.data import prepared
from copedit_training.evaluation import compare

EVERY = 5  # of so many requests the last is hostile
SAMPLES = 20  # of the server's memory, over the whole load


@dataclass
class Case:
    """A study, and what the command writes for it."""

    model: str
    files: list[Path]
    fields: dict[str, Any]
    wanted: dict[str, bytes]
    alone: list[float] = field(default_factory=list)  # seconds from request to answer, one at a time
    loaded: list[float] = field(default_factory=list)  # the same, several at a time


def run(
    models: Sequence[str],
    *,
    requests: int = 500,
    clients: int = 8,
    alone: int = 50,
    steps: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """`alone` requests one at a time, then `requests` of them, `clients` at a time; JSON-able.

    Every fifth of the latter is hostile. Every answer is compared with the files of `copedit synth`. Simulated studies.
    Raises CopeditError where an answer differs, a request has none, or a hostile one is not refused.
    steps: of the sampler, by default the model's.
    """
    with tempfile.TemporaryDirectory() as folder:
        cases = [_case(Path(folder) / str(i), model, steps) for i, model in enumerate(models)]
        hostile = list(_hostile(Path(folder) / "hostile", cases[0].files[0]))
        with _server(models, clients) as address:
            client, total = Client(address, seconds=3600, tries=1), alone + requests
            client.wait(600)
            for case in cases * 2:
                _good(client, case)
            for i in range(alone):
                cases[i % len(cases)].alone.append(_good(client, cases[i % len(cases)]))
                progress(i + 1, total)
            before, memory, statuses = _numbers(client), [], Counter[int]()
            lock, done = threading.Lock(), 0

            def one(i: int) -> None:
                nonlocal done
                if i % EVERY == EVERY - 1:
                    status = _refused(client, *hostile[i // EVERY % len(hostile)])
                else:
                    case, status = cases[(i - i // EVERY) % len(cases)], 200  # in turn, whatever EVERY is
                    case.loaded.append(_good(client, case))
                with lock:
                    statuses[status] += 1
                    done += 1
                    if done % max(1, requests // SAMPLES) == 0:
                        memory.append(_numbers(client)["process_resident_memory_bytes"])
                    progress(alone + done, total)

            start = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(one, range(requests)))
            seconds, after = time.perf_counter() - start, _numbers(client)
    return {
        "machine": describe(torch.device("cpu")),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load": list(os.getloadavg()),
        "requests": requests,
        "clients": clients,
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "seconds": seconds,
        "processor_seconds": after["process_cpu_seconds_total"] - before["process_cpu_seconds_total"],
        "memory": {"before": before["process_resident_memory_bytes"], "samples": memory},
        "models": [
            {
                "model": case.model,
                "steps": case.fields["steps"],
                "alone": _spread(case.alone),
                "loaded": _spread(case.loaded),
            }
            for case in cases
        ],
    }


def _case(folder: Path, model: str, steps: int | None) -> Case:
    """A simulated study with something missing, and what the command makes of it."""
    config, (given, out) = checkpoint.read_config(checkpoint.locate(model)), (folder / "in", folder / "out")
    phantom, brain = prepared.phantom_subject(config, prepared.HELD_OUT), not config.task.joint
    slices = [] if brain else compare.missing_slices(config, phantom, [config.elements[1]])
    for element in config.elements[1:] if brain else [STACK]:
        name = f"case_{element}.nii.gz" if brain else "heart_sax.nii.gz"
        Volume.from_array(phantom.images[element], phantom.affine()).save(given / name)
    named = [f"--missing-slices={','.join(map(str, slices))}"] if slices else []
    command = [sys.executable, "-m", "copedit_rt", "synth", str(given), "-o", str(out), "--model", model, "-q", *named]
    taken = config.diffusion.steps if steps is None else steps
    subprocess.run([*command, "--device", "cpu", "--steps", str(taken)], check=True)
    wanted = {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}
    fields = {"model": config.name, "missing_slices": slices or None, "steps": taken}
    return Case(config.name, sorted(given.iterdir()), fields, wanted)


def _hostile(folder: Path, sound: Path) -> Iterator[tuple[list[Path], dict[str, Any]]]:
    """Files and fields that a server must refuse."""
    folder.mkdir(parents=True)
    whole = sound.read_bytes()
    for name, content in {
        "cut_t1.nii.gz": whole[: len(whole) // 2],
        "empty_t1.nii.gz": b"",
        "text_t1.nii.gz": b"no image " * 1000,
        "bad.zip": b"PK\x03\x04" + os.urandom(1000),
        "mystery.nii.gz": whole,
    }.items():
        (folder / name).write_bytes(content)
        yield [folder / name], {}
    yield [sound], {"steps": "many"}
    yield [sound], {"model": "../../etc/passwd"}
    yield [sound], {"nonsense": 1}
    yield [sound], {"target": "pd"}


@contextmanager
def _server(models: Sequence[str], clients: int) -> Iterator[str]:
    """The command on a free port, with room for more requests than there are clients: its address."""
    named = [part for model in models for part in ("--model", model)]
    command = [sys.executable, "-m", "copedit_rt", "serve", "--port", "0", "--device", "cpu", *named]
    command += ["--queue", str(2 * clients)]  # a place is free a moment after its answer
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        said = ""
        for line in server.stderr:
            said += line
            if address := re.search(r"http://\S+", line):
                break
        else:
            raise CopeditError(f"the server did not start: {said.strip()}")
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield address[0]
    finally:
        server.terminate()
        server.wait(60)


def _good(client: Client, case: Case) -> float:
    """Seconds of a request that is answered with what the command writes."""
    start = time.perf_counter()
    made = client.synth(case.files, **case.fields)
    seconds = time.perf_counter() - start
    if {name: content for name, content in made.items() if name.endswith(".nii.gz")} != case.wanted:
        raise CopeditError(f"the server's answer for {case.model} differs from what copedit synth writes")
    return seconds


def _refused(client: Client, files: list[Path], fields: Mapping[str, Any]) -> int:
    try:
        client.synth(files, **fields)
    except ServerError as error:
        if 400 <= error.status < 500 and not re.search(r"(?<![\w.])/\w+/", str(error)):  # and tells no path
            return error.status
        raise
    raise CopeditError(f"the server took {files[0].name} {dict(fields)}")


def _numbers(client: Client) -> dict[str, float]:
    lines = [line for line in client.metrics().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def _spread(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {"count": len(seconds), "median": statistics.median(seconds), "p99": quantile(seconds, 0.99)}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a table and two sentences."""
    lines = ["| model | steps | at a time | requests | median | 99th |", "|---|--:|--:|--:|--:|--:|"]
    for row in report["models"]:
        for clients, name in ((1, "alone"), (report["clients"], "loaded")):
            if spread := row[name]:
                cells = f"{spread['count']} | {spread['median']:.2f} s | {spread['p99']:.2f} s"
                lines.append(f"| {row['model']} | {row['steps']} | {clients} | {cells} |")
    mib = [value / 2**20 for value in report["memory"]["samples"]]
    each = report["processor_seconds"] / report["statuses"]["200"]
    answers = ", ".join(f"{count} of {status}" for status, count in report["statuses"].items())
    lines += [
        "",
        f"{report['requests']} requests, {report['clients']} at a time, in {report['seconds']:.0f} s; answers: "
        f"{answers}. {each:.2f} s of processor a study, the refused requests' included. Every image was bit for bit "
        "that of the command.",
        f"Memory of the server: {report['memory']['before'] / 2**20:.0f} MiB before, {min(mib):.0f} to {max(mib):.0f} "
        f"MiB during the load, {mib[-1]:.0f} MiB at the end.",
        f"Load average at the end {report['load'][0]:.1f} on {os.cpu_count()} cores, OMP_NUM_THREADS "
        f"{report['threads'] or 'not set'}.",
    ]
    return "\n".join(lines) + "\n"
