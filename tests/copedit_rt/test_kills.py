"""A cohort that is killed, at every point where it writes and at random moments, and one of many studies: nothing is
lost and nothing left behind."""

import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import save
from small import BRAIN, saved

from copedit_rt import cohort, files
from copedit_rt.config import DiffusionConfig
from copedit_rt.images.study import complete_sidecar
from copedit_rt.listener import Listener
from copedit_rt.synthesizer import Synthesizer

GRID = (12, 11, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return saved(replace(BRAIN, diffusion=DiffusionConfig(steps=1)), tmp_path_factory.mktemp("kills") / "model")


@pytest.fixture
def loaded(model, monkeypatch) -> Synthesizer:
    """The model, read once for all runs of a test."""
    found = Synthesizer.load(model, "cpu")
    monkeypatch.setattr(Synthesizer, "load", lambda *given, **options: found)
    return found


def many(folder: Path, count: int) -> Path:
    draw = np.random.default_rng(0)
    images = {element: draw.uniform(1, 900, GRID).astype(np.float32) for element in ("t1", "t2")}
    affine = np.diag([3.0, 3.0, 4.0, 1.0])
    for number in range(count):
        for element, image in images.items():
            save(folder / f"s{number:03d}" / f"s{number:03d}_{element}.nii.gz", image + number, affine)
    return folder


def run(source: Path, output: Path, model: Path, **options: object) -> dict:
    files._SWEPT.clear()  # as in a new process
    return cohort.synthesise([source], output, model=str(model), **options)


def content(folder: Path) -> dict[str, bytes]:
    """All files but the summary, which says when; of a sidecar not which elements were made in the same run."""
    there = (p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith("copedit_summary"))
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in there}
    return {n: re.sub(rb'"synthesised": [^]]*]', b"", x) if n.endswith(".json") else x for n, x in found.items()}


class Killed(BaseException):
    """What SIGKILL would do: nothing that is there to tidy up runs."""


class Killer:
    """Dies before or after the n-th thing that is done to the disk, and does nothing more; counts them otherwise."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None = None) -> None:
        self.at, self.count, self.dead = at, 0, False
        for name in ("replace", "fsync", "open"):
            patch.setattr(files.os, name, self.around(getattr(os, name)))
        patch.setattr(files, "open", self.opened, raising=False)
        patch.setattr(files, "remove", self.remove(files.remove))

    def event(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.dead = True
            raise Killed

    def around(self, real: Callable) -> Callable:
        def call(*given, **options):
            self.event()
            result = real(*given, **options)
            self.event()
            return result

        return call

    def opened(self, *given, **options):
        file = open(*given, **options)
        real = file.write

        class Proxy:
            def __enter__(proxy):
                return proxy

            def __exit__(proxy, *raised):
                if not self.dead:  # what is in the buffer of a dead process is lost
                    file.close()

            def __getattr__(proxy, name):
                return getattr(file, name)

            def write(proxy, piece):
                self.event()
                return real(piece)

        return Proxy()

    def remove(self, real: Callable) -> Callable:
        return lambda part: None if self.dead else real(part)


def points(count: int, most: int) -> Iterator[int]:
    """At most so many of the points 1..count, evenly."""
    yield from sorted({int(n) for n in np.linspace(1, count, min(count, most)).round()})


@pytest.mark.parametrize("most", [24, pytest.param(10_000, marks=pytest.mark.slow)])
def test_killed_at_every_point_of_writing(tmp_path, model, loaded, monkeypatch, most):
    """Two samples, so that there is a map of their deviation beside each image."""
    options = {"samples": 2}
    source, whole = many(tmp_path / "in", 2), tmp_path / "whole"
    with monkeypatch.context() as patch:
        killer = Killer(patch)
        run(source, whole, model, **options)
    expected = content(whole)
    assert len(expected) == 12 and killer.count > 80
    for at in points(killer.count, most):
        output = tmp_path / f"out-{at}"
        with monkeypatch.context() as patch, pytest.raises(Killed):
            Killer(patch, at)
            run(source, output, model, **options)
        done = [path for path in output.rglob("*.nii.gz") if complete_sidecar(path)]
        assert all(expected[p.relative_to(output).as_posix()] == p.read_bytes() for p in done), "complete and wrong"
        summary = run(source, output, model, **options)
        kept = [path for e in summary["studies"] for k, path in e["outputs"].items() if _kept(e, k)]
        assert {str(path) for path in done} == set(kept), f"point {at}: done again, or taken for done"
        assert content(output) == expected, f"point {at}"
        shutil.rmtree(output)


def _kept(entry: dict, element: str) -> bool:
    return entry["status"] == "kept" or element in entry.get("kept", ())


FORK = multiprocessing.get_context("fork")


def forked(source: Path, output: Path, model: Path) -> multiprocessing.Process:
    """A cohort in a process of its own, which has all imports already."""

    def body() -> None:
        torch.set_num_threads(1)
        try:
            run(source, output, model)
        finally:
            os._exit(0)

    process = FORK.Process(target=body)
    process.start()
    return process


@pytest.mark.slow
def test_twenty_kills_of_a_cohort_lose_nothing_and_leave_nothing(tmp_path, model):
    source, output = many(tmp_path / "in", 60), tmp_path / "out"
    whole = forked(source, tmp_path / "whole", model)
    whole.join()
    expected, draw, done = content(tmp_path / "whole"), np.random.default_rng(0), {}
    assert len(expected) == 240
    for kill in range(20):
        process = forked(source, output, model)
        while process.is_alive() and sum(1 for _ in output.rglob("*.json")) <= 5 * kill:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        assert process.is_alive(), "it was to be killed"
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        found = content(output)
        assert all(found.get(name) == old for name, old in done.items()), "lost what was complete"
        done = {name: found[name] for name in found if name.endswith(".json") or complete_sidecar(output / name)}
        assert all(expected[name] == there for name, there in done.items())
    last = forked(source, output, model)
    last.join()
    assert content(output) == expected


@pytest.mark.slow
def test_three_hundred_studies_take_no_more_than_the_first(tmp_path, model):
    """Memory and file descriptors stay as they are."""
    source = many(tmp_path / "in", 300)
    taken: list[tuple[int, int]] = []

    class Watch(Listener):
        def ended(self, entry, error) -> None:
            assert entry["status"] == "written"
            if len(taken) % 25 == 0:
                gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            taken.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))

    summary = run(source, tmp_path / "out", model, listener=Watch())
    assert summary["written"] == 300 and json.dumps(summary)
    memory, handles = np.array(taken).T
    early, late = memory[25:75].max() / 2**20, memory[-50:].max() / 2**20
    print(f"{early:.1f} MiB up to study 75, {late:.1f} in the last 50; at most {handles.max()} file descriptors")
    assert late - early < 16
    assert handles[-50:].max() <= handles[:50].max()
