"""The body of `copedit bench kernels`: every operator at every preset shape, beside what it could be replaced by.

Per case (an operator at one shape) every contestant is checked against float64 first; one that is wrong is reported and
not timed. Then all contestants of a direction are timed in turns, call by call and, on CUDA, as a CUDA graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from copedit_bench import machine
from copedit_bench.operators.cases import OPERATORS, Case, Fill, Operator, directions, floor, preset_cases
from copedit_bench.operators.contestants import Contestant, Verdict
from copedit_bench.timing import (
    TIME_UP,
    Lap,
    Stopwatch,
    Yardsticks,
    calls_of,
    interleave,
    quantile,
    repeated,
    rotating,
    sentence,
)
from copedit_rt.device import choose_device
from copedit_rt.errors import CopeditError

SECONDS = 420.0  # for everything, by default: an H200 run has to end within 8 minutes
CELL = 0.06  # seconds of samples a contestant; less where the time runs short
CASE = 5.0  # seconds that a case is expected to take, of which that depends
COMPILING = 0.45  # share of the time that compilers may take; after that they are left out
SEED = 0

Say = Callable[[int, int], None]


def plan(ops: Sequence[str] | None, device: str, dtype: str | None) -> tuple[list[Case], torch.device, torch.dtype]:
    """The cases, device and type that the command's options mean; CopeditError for what does not exist."""
    for op in ops or ():
        if op not in OPERATORS:
            raise CopeditError(f"--op {op}: there is no such operator; choose one of {', '.join(OPERATORS)}")
    where = choose_device(device)
    small = where.type == "cpu"
    known = {_plain(t): t for t in (torch.bfloat16, torch.float16, torch.float32)}
    what = dtype or ("float32" if small else "bfloat16")
    if what not in known:
        raise CopeditError(f"--dtype {what}: choose one of {', '.join(known)}")
    if small:
        # Nothing is learnt from a CPU but that the harness works, so the compiler is tried at these shapes.
        cases = [replace(case, tier=1) for case in preset_cases(ops or OPERATORS, ("demo-brain", "demo-cardiac"), (1,))]
    else:
        cases = preset_cases(ops or OPERATORS)
    return cases, where, known[what]


def rivals(against: Sequence[str] | None) -> Mapping[str, Operator]:
    """The operators beside these contestants only, named by how they begin; ours and the baselines stay. None: all.

    Raises CopeditError for a beginning that no contestant has.
    """
    names = {name for row in OPERATORS.values() for name in row.contestants}
    for start in against or ():
        if not any(name.startswith(start) for name in names):
            raise CopeditError(f"--against {start}: no contestant begins so; there are {', '.join(sorted(names))}")
    if not against:
        return OPERATORS
    kept = {}
    for op, row in OPERATORS.items():
        wanted = (*row.ours, row.baseline, *(name for name in row.contestants if name.startswith(tuple(against))))
        kept[op] = replace(row, contestants={name: row.contestants[name] for name in row.contestants if name in wanted})
    return kept


def run(
    cases: Sequence[Case],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = SECONDS,
    progress: Say | None = None,
    save: Callable[[dict[str, Any]], Any] | None = None,
    operators: Mapping[str, Operator] = OPERATORS,
) -> dict[str, Any]:
    """Measure the cases; JSON-able.

    machine, settings, yardsticks; checks: one entry a case and contestant, with its status ok, wrong, failed,
    unavailable or skipped; timings: one entry a case, contestant, direction and mode; overhead: microseconds of Python
    a call on tiny tensors. seconds: what does not fit is listed as skipped. save: called with the report so far after
    every case.
    """
    if not cases:
        raise CopeditError("no case to measure: name operators that exist")
    bench = _Bench(device, dtype, seconds, operators, {operators[case.op].dtype or dtype for case in cases})
    # Retained graphs are walked backward many times, which compiled ones refuse while they reuse its buffers.
    with bench.watch.stream(), torch._functorch.config.patch(donated_buffer=False):
        bench.sticks.measure()
        for op in dict.fromkeys(case.op for case in cases):
            bench.overhead(op)
        for number, case in enumerate(cases):
            bench.measure(case, len(cases) - number)
            if progress:
                progress(number + 1, len(cases))
            if save:
                save(bench.report())
        clocks = machine.clocks(device) if device.type == "cuda" else {}
    return bench.report() | {"clocks_after": clocks}


class _Bench:
    """One run."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        seconds: float,
        operators: Mapping[str, Operator],
        dtypes: set[torch.dtype],
    ):
        self.start = time.perf_counter()
        self.device, self.dtype, self.seconds, self.operators = device, dtype, seconds, operators
        self.compiling = COMPILING * seconds
        self.watch = Stopwatch(device)
        with self.watch.stream():
            self.sticks = Yardsticks(self.watch, dtypes)
        self.machine = machine.describe(device)
        self.checks: list[dict[str, Any]] = []
        self.timings: list[dict[str, Any]] = []
        self.overheads: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.start)

    # What one case is

    def measure(self, case: Case, remaining: int) -> None:
        """Check and time every contestant at one shape."""
        operator = self.operators[case.op]
        if self.left <= 0:
            for name in operator.contestants:
                self._check(case, name, "skipped", TIME_UP[0])
            return
        torch.compiler.reset()  # past eight shapes of one function, compilers would silently stop compiling
        try:
            setting = _Setting(case, operator, operator.dtype or self.dtype, self.watch)
        except Exception as error:
            for name in operator.contestants:
                self._check(case, name, "failed", f"inputs or reference: {sentence(error)}")
        else:
            calls = {name: call for name in operator.contestants if (call := self._checked(case, setting, name))}
            budget = CELL * min(1.0, self.left / (CASE * remaining))
            for direction in directions(case.op):
                self._time(case, setting, calls, direction, budget)
        setting = calls = None  # type: ignore[assignment]
        self.watch.free()
        self.sticks.measure()

    def _checked(self, case: Case, setting: _Setting, name: str) -> Callable[..., Any] | None:
        """The contestant's function if its answer is right, else None; the verdict goes into the report."""
        contestant = setting.operator.contestants[name]
        if reason := contestant.missing(self.device):
            self._check(case, name, "unavailable", reason)
            return None
        if case.tier > contestant.tier:
            self._check(case, name, "skipped", "not measured at this shape: it takes seconds to compile")
            return None
        options = contestant.options
        if options is not None and self.compiling <= 0:
            self._check(case, name, "skipped", TIME_UP[1])
            return None
        start = time.perf_counter()
        try:
            call = contestant.call if options is None else torch.compile(partial(contestant.call), **options)
            with contestant.context():
                verdict = setting.judge(name, call)
        except Exception as error:
            self._check(case, name, "failed", sentence(error))
            self.watch.free()
            return None
        finally:
            if options is not None:
                self.compiling -= time.perf_counter() - start
        status = "ok" if verdict.right else "wrong"
        size = verdict.error if math.isfinite(verdict.error) else None  # JSON has neither NaN nor infinity
        self._check(case, name, status, verdict.note, error=size, tolerance=verdict.tolerance)
        return call if verdict.right else None

    def _check(self, case: Case, name: str, status: str, note: str, **numbers: float | None) -> None:
        self.checks.append(_key(case) | {"contestant": name, "status": status, "note": note} | numbers)

    def _time(
        self, case: Case, setting: _Setting, calls: Mapping[str, Callable[..., Any]], direction: str, budget: float
    ) -> None:
        laps: dict[tuple[str, str], Lap] = {}
        peaks: dict[str, int | None] = {}
        for name, call in calls.items():
            try:
                lap, peaks[name] = setting.lap(name, call, direction)
            except Exception as error:
                self._broken(case, name, f"{direction}: {sentence(error)}")
                continue
            laps[name, "eager"] = lap
            if self.watch.graphs:
                try:
                    laps[name, "graph"] = self.watch.capture(lap)
                except Exception as error:
                    self._broken(case, name, f"{direction}, capture: {sentence(error)}")
        samples, broken = interleave(laps, self.watch, budget * len(laps))
        for (name, mode), reason in broken.items():
            self._broken(case, name, f"{direction}, {mode}: {reason}")
        moved, computed = floor(case.op, direction, case.sizes, setting.dtype.itemsize)
        for (name, mode), values in samples.items():
            median = quantile(values, 0.5)
            self.timings.append(
                _key(case)
                | {
                    "dtype": _plain(setting.dtype),
                    "contestant": name,
                    "direction": direction,
                    "mode": mode,
                    "median_us": 1e6 * median,
                    "low_us": 1e6 * quantile(values, 0.1),
                    "high_us": 1e6 * quantile(values, 0.9),
                    "samples": len(values),
                    "calls": laps[name, mode].calls,
                    "bytes": moved,
                    "operations": computed,
                    "gb_s": moved / median / 1e9,
                    "tflop_s": computed / median / 1e12,
                    "peak_bytes": peaks[name],
                }
            )

    def _broken(self, case: Case, name: str, reason: str) -> None:
        entry = next(c for c in reversed(self.checks) if (c["contestant"], c["op"]) == (name, case.op))
        entry.setdefault("broken", []).append(reason)
        self.watch.free()

    # Python's share

    def overhead(self, op: str, calls: int = 100) -> None:
        """Microseconds that a call keeps the Python thread busy, on tensors too small to matter."""
        operator = self.operators[op]
        dtype = operator.dtype or self.dtype
        for name in ("ours", operator.baseline):
            contestant = operator.contestants[name]
            sample = _sample(operator, operator.small, dtype, self.device, SEED)
            for direction in ("forward", "both") if operator.learn else ("forward",):
                try:
                    with _within(contestant, direction):
                        step = _step(contestant.call, [sample], direction, [])
                        for _ in range(3):
                            step(0)
                        times = []
                        for _ in range(9):
                            self.watch.sync()
                            start = time.perf_counter()
                            for _ in range(calls):
                                step(0)
                            times.append((time.perf_counter() - start) / calls)
                except Exception as error:
                    entry: dict[str, Any] = {"us": None, "note": sentence(error)}
                else:
                    entry = {"us": 1e6 * quantile(times, 0.5), "low_us": 1e6 * quantile(times, 0.1)}
                    entry["high_us"] = 1e6 * quantile(times, 0.9)
                self.overheads.append({"op": op, "contestant": name, "direction": direction} | entry)

    def report(self) -> dict[str, Any]:
        """Everything so far, rates as shares of the yardsticks of the same run."""
        sticks = self.sticks.report()
        copy = sticks["copy"]["median"]
        timings = [
            row
            | {
                "copy_share": 1e9 * row["gb_s"] / copy,
                "product_share": 1e12 * row["tflop_s"] / sticks["product"][row["dtype"]]["median"],
            }
            for row in self.timings
        ]
        return {
            "format": 1,
            "machine": self.machine,
            "settings": {"dtype": _plain(self.dtype), "seconds": self.seconds, "seed": SEED},
            "seconds": time.perf_counter() - self.start,
            "yardsticks": sticks,
            "checks": self.checks,
            "timings": timings,
            "overhead": self.overheads,
        }


class _Setting:
    """One case's inputs, cotangents and exact results."""

    def __init__(self, case: Case, operator: Operator, dtype: torch.dtype, watch: Stopwatch):
        self.operator, self.dtype, self.watch = operator, dtype, watch
        first = _sample(operator, case.sizes, dtype, watch.device, SEED)
        sets = watch.rotation(sum(x.numel() * x.element_size() for x in first.tensors))
        others = (_sample(operator, case.sizes, dtype, watch.device, SEED + i) for i in range(1, sets))
        self.samples = [first, *others]
        self.exact = _outcome(operator.exact or operator.reference, operator, first.double())
        self._low: dict[str, Tensor] | None = None

    def judge(self, name: str, call: Callable[..., Any]) -> Verdict:
        """Compare a contestant's results and gradients with the exact ones."""
        found = _outcome(call, self.operator, self.samples[0])
        if self.operator.judge:
            exact, low = self.exact["output 0"], self.low()
            return self.operator.judge(
                found["output 0"], exact, low and low["output 0"], *self.samples[0].inputs.values(), name
            )
        return judge_values(found, self.exact, None if name == self.operator.baseline else self.low(), self.dtype)

    def low(self) -> dict[str, Tensor] | None:
        """Results of the baseline, in the precision that is measured; None where it cannot run."""
        if self._low is None:
            contestant = self.operator.contestants[self.operator.baseline]
            try:
                with contestant.context():
                    self._low = _outcome(contestant.call, self.operator, self.samples[0])
            except Exception:
                self._low = {}
        return self._low or None

    def lap(self, name: str, call: Callable[..., Any], direction: str) -> tuple[Lap, int | None]:
        """A contestant ready to be timed, and its peak memory."""
        contestant = self.operator.contestants[name]
        context = partial(_within, contestant, direction)
        with context():
            retained = [_tuple(call(*s.arguments)) for s in self.samples] if direction == "backward" else []
            step = _step(call, self.samples, direction, retained)
            step(0)
            peak = self.watch.peak(lambda: step(0))
        once = self.watch.sample(Lap(partial(step, 0), 1, context))
        sets = rotating(once, len(self.samples))
        calls = calls_of(self.watch.sample(Lap(repeated(step, sets, sets), sets, context)), sets)
        return Lap(repeated(step, calls, sets), calls, context), peak


class _Sample:
    """Arguments of a call and, for operators with gradients, random cotangents."""

    def __init__(self, operator: Operator, inputs: dict[str, Any], cotangents: list[Tensor]):
        self.operator, self.cotangents = operator, cotangents
        self.inputs = {
            name: x.detach().requires_grad_(name in operator.learn) if isinstance(x, Tensor) else x
            for name, x in inputs.items()
        }
        self.arguments = tuple(self.inputs.values())
        self.learned = [self.inputs[name] for name in operator.learn]

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (*self.arguments, *self.cotangents) if isinstance(x, Tensor)]

    def double(self) -> _Sample:
        """The same in float64."""

        def wide(x: Any) -> Any:
            return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x

        inputs = {name: wide(x) for name, x in self.inputs.items()}
        return _Sample(self.operator, inputs, [wide(x) for x in self.cotangents])


def _sample(
    operator: Operator, sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device, seed: int
) -> _Sample:
    fill = Fill(dtype, device, seed)
    inputs = operator.inputs(sizes, fill)
    cotangents: list[Tensor] = []
    if operator.learn:
        # The shapes of the results, without computing them.
        fake = [x.to("meta") if isinstance(x, Tensor) else x for x in inputs.values()]
        with torch.no_grad():
            shapes = [out.shape for out in _tuple(operator.reference(*fake))]
        cotangents = [fill(*shape) for shape in shapes]
    return _Sample(operator, inputs, cotangents)


def _step(
    call: Callable[..., Any],
    samples: Sequence[_Sample],
    direction: str,
    retained: Sequence[tuple[Tensor, ...]],
) -> Callable[[int], Any]:
    """Function of the sample's number: one call in a direction."""

    def forward(i: int) -> Any:
        return call(*samples[i].arguments)

    def backward(i: int) -> Any:
        return torch.autograd.grad(retained[i], samples[i].learned, samples[i].cotangents, retain_graph=True)

    def both(i: int) -> Any:
        out = _tuple(call(*samples[i].arguments))
        return torch.autograd.grad(out, samples[i].learned, samples[i].cotangents)

    return {"forward": forward, "backward": backward, "both": both}[direction]


def _outcome(call: Callable[..., Any], operator: Operator, sample: _Sample) -> dict[str, Tensor]:
    """Results without gradients ("output 0"), results with ("recorded 0") and gradients ("d x"); inputs stay as they
    are."""
    arguments = [
        x.clone() if name in operator.mutated else x for name, x in zip(sample.inputs, sample.arguments, strict=True)
    ]
    with torch.no_grad():
        found = {f"output {i}": x for i, x in enumerate(_tuple(call(*arguments)))}
    if operator.learn:
        recorded = _tuple(call(*arguments))
        gradients = torch.autograd.grad(recorded, sample.learned, sample.cotangents)
        found |= {f"recorded {i}": x.detach() for i, x in enumerate(recorded)}
        found |= {f"d {name}": x for name, x in zip(operator.learn, gradients, strict=True)}
    return found


def judge_values(
    found: Mapping[str, Tensor], exact: Mapping[str, Tensor], low: Mapping[str, Tensor] | None, dtype: torch.dtype
) -> Verdict:
    """Greatest error of each result relative to its greatest value. Allowed are twice the baseline's, one rounding and
    16 of float32, in which sums are accumulated; to the baseline itself, and where it cannot run, 32 roundings."""
    eps = torch.finfo(dtype).eps
    sums = 16 * torch.finfo(torch.float32).eps
    verdicts = []
    for name, truth in exact.items():
        scale = float(truth.abs().max()) or 1.0
        if found[name].shape != truth.shape or found[name].dtype != dtype:
            kind = f"{tuple(found[name].shape)} {_plain(found[name].dtype)}"
            return Verdict(float("inf"), 0.0, f"{name} is {kind}, not {tuple(truth.shape)} {_plain(dtype)}")
        error = float((found[name].double() - truth).abs().max()) / scale
        allowed = 32 * eps
        if low is not None:
            allowed = 2 * float((low[name].double() - truth).abs().max()) / scale + eps + sums
        verdicts.append(Verdict(error, allowed, name))
    return max(verdicts, key=lambda v: v.error / v.tolerance if v.error == v.error else float("inf"))


@contextmanager
def _within(contestant: Contestant, direction: str) -> Iterator[None]:
    """The contestant's context, and no gradients in a forward pass by itself."""
    with ExitStack() as stack:
        stack.enter_context(contestant.context())
        if direction == "forward":
            stack.enter_context(torch.no_grad())
        yield


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def _key(case: Case) -> dict[str, Any]:
    return {"op": case.op, "presets": list(case.presets), "sizes": dict(case.sizes), "tier": case.tier}


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
