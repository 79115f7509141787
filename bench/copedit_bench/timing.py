"""Clocks, CUDA graphs, peak memory and the yardsticks that everything is measured against."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

ROUNDS = (3, 40)  # at least and at most, of every contestant
SAMPLE, LONGEST = 1e-3, 2e-2  # seconds that one sample takes at least, and at most if it is of several calls
CALLS = 64  # in one sample at most

TIME_UP = ("the time was up", "the time for compilers was up")  # why something was skipped

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Lap:
    """What one sample times: run() makes `calls` calls, within context()."""

    run: Callable[[], Any]
    calls: int
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class Stopwatch:
    """Times, captures and weighs on one device. On CUDA everything must run on one stream that is not the default one
    (`stream`), since the backward of a forward on the default stream cannot be captured."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.cuda else None

    @property
    def graphs(self) -> bool:
        """Whether calls can be captured."""
        return self.cuda

    def stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def sample(self, lap: Lap) -> float:
        """Seconds a call, between CUDA events on a GPU that was idle before: launches count where they do not hide."""
        with lap.context():
            self.sync()
            if not self.cuda:
                start = time.perf_counter()
                lap.run()
                return (time.perf_counter() - start) / lap.calls
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            lap.run()
            last.record()
            last.synchronize()
            return first.elapsed_time(last) / 1e3 / lap.calls

    def capture(self, lap: Lap) -> Lap:
        """The same calls as one replay of a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with lap.context(), torch.cuda.graph(graph, stream=self._stream):
            lap.run()
        return Lap(graph.replay, lap.calls)

    def peak(self, call: Callable[[], Any]) -> int | None:
        """Bytes allocated at the worst moment of a call, its outputs included, over what was allocated before it."""
        if not self.cuda:
            return None
        self.sync()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        out = call()
        self.sync()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del out
        return peak

    def rotation(self, size: int) -> int:
        """How many sets of inputs of that many bytes outgrow the L2 cache twice; 1 on a CPU."""
        if not self.cuda:
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return min(CALLS, math.ceil(2 * cache / max(size, 1)))

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def repeated(call: Callable[[int], Any], calls: int, sets: int) -> Callable[[], None]:
    """call(0), call(1), ... over rotating inputs. Results live until their place comes again, so that outputs do not
    stay in the cache either."""

    def run() -> None:
        kept: list[Any] = [None] * sets
        for i in range(calls):
            kept[i % sets] = call(i % sets)

    return run


def rotating(seconds: float, sets: int) -> int:
    """Sets of inputs to rotate through for a call of so many seconds: a call that long moves enough by itself."""
    return max(1, min(sets, int(LONGEST / max(seconds, 1e-9))))


def calls_of(seconds: float, sets: int) -> int:
    """Calls in a sample for a call of so many seconds: enough to time well, and all the inputs."""
    return max(sets, min(CALLS, math.ceil(SAMPLE / max(seconds, 1e-9))))


def interleave(
    laps: Mapping[K, Lap], stopwatch: Stopwatch, budget: float
) -> tuple[dict[K, list[float]], dict[K, str]]:
    """Seconds a call of each, one sample a round, the first in turn another one; a round of warm-up before.

    Stops after `budget` seconds, but not before ROUNDS[0] rounds. Also returns why some broke down.
    """
    samples: dict[K, list[float]] = {key: [] for key in laps}
    broken: dict[K, str] = {}
    keys = list(laps)
    start = time.perf_counter()
    for number in range(-1, ROUNDS[1]):
        if number >= ROUNDS[0] and time.perf_counter() - start > budget:
            break
        first = max(number, 0) % max(len(keys), 1)
        for key in keys[first:] + keys[:first]:
            if key in broken:
                continue
            try:
                seconds = stopwatch.sample(laps[key])
            except Exception as error:
                broken[key] = sentence(error)
                continue
            if number >= 0:
                samples[key].append(seconds)
    return {key: values for key, values in samples.items() if key not in broken}, broken


def sentence(error: BaseException) -> str:
    """The first line of what an error says."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {text}"[:300]


def quantile(values: list[float], share: float) -> float:
    """Linear between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


class Yardsticks:
    """A copy and a matrix product, timed again and again between the cases of one run."""

    def __init__(self, stopwatch: Stopwatch, dtypes: set[torch.dtype]):
        self.stopwatch = stopwatch
        megabytes, side = (512, 8192) if stopwatch.cuda else (32, 512)
        self._source = torch.ones(megabytes << 20, dtype=torch.uint8, device=stopwatch.device)
        self._target = torch.empty_like(self._source)
        self._squares = {dtype: torch.randn(side, side, device=stopwatch.device).to(dtype) for dtype in dtypes}
        self._copies: list[float] = []
        self._products: dict[torch.dtype, list[float]] = {dtype: [] for dtype in dtypes}

    def measure(self, samples: int = 3) -> None:
        """A few more samples; the first of each kind ever is a warm-up."""
        copies = 2 * self._source.numel()
        for _ in range(samples):
            self._copies.append(copies / self._time(lambda: self._target.copy_(self._source)))
            for dtype, square in self._squares.items():
                self._products[dtype].append(2 * len(square) ** 3 / self._time(partial(torch.mm, square, square)))

    def _time(self, call: Callable[[], Tensor]) -> float:
        return self.stopwatch.sample(Lap(call, 1))

    def report(self) -> dict[str, Any]:
        """JSON-able: bytes a second copied (read and written), operations a second by dtype; median and deciles."""
        return {
            "copy": self._statistics(self._copies),
            "product": {str(d).removeprefix("torch."): self._statistics(v) for d, v in self._products.items()},
        }

    def _statistics(self, rates: list[float]) -> dict[str, float]:
        kept = rates[1:] or rates
        return {"median": quantile(kept, 0.5), "low": quantile(kept, 0.1), "high": quantile(kept, 0.9)}
