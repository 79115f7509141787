"""The engine on TensorRT, for CUDA GPUs: plans built from the ONNX files of `copedit export tensorrt`.

A plan fits one build of TensorRT and one kind of GPU. It is kept beside the weights, in the folder `tensorrt`, and used
only after it has agreed with torch once. What cannot be built, loaded or run, or does not agree, torch does: encoder,
step and decoder each for itself. A plan is executable code: never take one from somebody you do not trust.

Nothing here has run on a GPU yet. Tests hold every name of TensorRT's API in this file against the real bindings, build
the graphs with NVIDIA's TensorRT-RTX builder, and run the rest against a stand-in on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from copedit_rt import checkpoint, schedule
from copedit_rt.config import ModelConfig
from copedit_rt.engines.engine import Encoded
from copedit_rt.engines.onnx_engine import DECODER, ENCODER, STEP, Refused, read_manifest
from copedit_rt.errors import CopeditError
from copedit_rt.files import read_json, write_atomically

if TYPE_CHECKING:
    import tensorrt as trt

    from copedit_rt.engines.torch_engine import TorchEngine

GRAPHS = (ENCODER, STEP, DECODER)
FOLDER = "tensorrt"  # of plans, inside the model folder
FORMAT = 1  # of what is written beside a plan
WEIGHTS = {ENCODER: checkpoint.TOKENIZER, STEP: checkpoint.DENOISER, DECODER: checkpoint.TOKENIZER}
Shape = tuple[int, ...]
Progress = Callable[[str, int, int], None]  # what is done, steps done, in all

# How far a plan may be from torch in float32 on the same weights: the least cosine, and the largest error over the
# largest value. In float16 and bfloat16 twice the error that torch itself makes in them, at its worst over what was
# measured (docs/runtime.md): the step of demo-brain, with 0.999989 and 0.012, and with 0.99927 and 0.10.
LIMITS = {"float32": (0.999999, 0.001), "float16": (0.99995, 0.025), "bfloat16": (0.997, 0.2)}


def library() -> Any:
    """The module tensorrt. Raises CopeditError where it is not installed or cannot be loaded."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:  # OSError: its libraries
        raise CopeditError(
            f"engine tensorrt: TensorRT cannot be loaded ({error}); install it with pip install 'copedit[tensorrt]'"
        ) from error
    return tensorrt


def cuda(device: str) -> torch.device:
    """The GPU that a name stands for. Raises CopeditError where it stands for none."""
    from copedit_rt.device import choose_device

    found = choose_device(device)
    if found.type != "cuda":
        raise CopeditError(f"device {device!r}: the engine tensorrt needs a CUDA GPU; use the engine torch here")
    return found


def gpu(device: torch.device) -> str:
    """Name and compute capability of a GPU: what a plan is built for."""
    found = torch.cuda.get_device_properties(device)
    return f"{found.name} (sm_{found.major}{found.minor})"


# ------------------------------------------------------------------------------------------------------ building


def shapes(config: ModelConfig, graph: str, batch: int = 1) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Per input of a graph its smallest, commonest and largest shape, for up to `batch` studies at once.

    Commonest is: of the m elements all but one are there, and one is decoded.
    """
    m, c = len(config.elements), config.tokenizer
    z = (c.latent_channels, *config.latent)
    if graph == STEP:
        one: dict[str, Shape] = {"z": (m, *z), "t": (), "prompts": (3, c.prompt_dim), "observed": (m,)}
        one |= {"previous": (m, *z), "coefficients": (2, 2)}
        if config.denoiser.prior:
            one["prior"] = (m, *z)
        return {name: ((1, *s), (batch, *s), (batch, *s)) for name, s in one.items()}

    def given(least: int, common: int, *shape: int) -> tuple[Shape, Shape, Shape]:
        return (1, least, *shape), (batch, common, *shape), (batch, m, *shape)

    if graph == ENCODER:
        return {"images": given(1, m - 1, 1, *config.image), "observed": given(1, m - 1)}
    return {"z": given(m, m, *z) if config.task.joint else given(1, 1, *z)}


def build(
    graph: Path,
    ranges: Mapping[str, tuple[Shape, Shape, Shape]],
    timing: bytes = b"",
    progress: Progress | None = None,
) -> tuple[bytes, bytes]:
    """A plan of an ONNX file for the current GPU, and the timing cache after it.

    ranges: as `shapes` gives them; of inputs that the graph does not have, no notice is taken. timing: the cache of
    earlier builds; one that TensorRT does not accept is begun anew. Precision is that of the graph (strongly typed).

    Raises Refused where TensorRT cannot do it, with the first thing that it complained of.
    """
    trt = library()
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if network is None:
        raise Refused(f"{graph}: TensorRT makes no network{log.why()}")
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph.read_bytes(), str(graph)):
        raise Refused(f"{graph}: TensorRT {trt.__version__} cannot read it{_complaint(parser) or log.why()}")
    config = builder.create_builder_config()
    if config is None:
        raise Refused(f"{graph}: TensorRT makes no configuration{log.why()}")
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        profile.set_shape(tensor.name, *ranges[tensor.name])
    if config.add_optimization_profile(profile) < 0:
        raise Refused(f"{graph}: TensorRT does not accept its shapes{log.why()}")
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # Where no fused kernel fits (float32), from products and a softmax.
            layer.__class__ = trt.IAttentionBoundaryLayer
            layer.attention.decomposable = True
    cache = _timing(config, timing)
    monitor = _monitor(trt, graph.stem, progress)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.stop is not None:
        raise monitor.stop
    if plan is None:
        raise Refused(f"{graph}: TensorRT {trt.__version__} cannot build it{log.why()}")
    after = cache.serialize() if cache is not None else None
    return bytes(plan), timing if after is None else bytes(after)


def _timing(config: trt.IBuilderConfig, timing: bytes) -> trt.ITimingCache | None:
    """The timing cache that the configuration uses from now on, None where TensorRT gives none."""
    for content in (timing, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _complaint(parser: trt.OnnxParser) -> str:
    """The first thing that the parser did not understand."""
    if not parser.num_errors:
        return ""
    error: trt.ParserError = parser.get_error(0)
    return f": node {error.node_name()}, {_line(error.desc())}"


def _log(trt: Any) -> Any:
    """A logger that remembers errors."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg)

        def why(self) -> str:
            return f": {_line(self.errors[0])}" if self.errors else ""

    return Log()


def _line(text: str) -> str:
    """The first line of what TensorRT says, which may be long."""
    lines = text.strip().splitlines() or [""]
    return lines[0][:300]


def _monitor(trt: Any, name: str, progress: Progress | None) -> Any:
    """What TensorRT tells the progress of a build to, from any thread."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.lock = threading.Lock()
            self.running: dict[str, list[int]] = {}  # phase -> steps done, in all; outermost first
            self.stop: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self.lock:
                self.running[phase_name] = [0, num_steps]
            self.tell()

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self.lock:
                if phase_name in self.running:
                    self.running[phase_name][0] = step + 1
            self.tell()
            return self.stop is None

        def phase_finish(self, phase_name: str) -> None:
            with self.lock:
                self.running.pop(phase_name, None)
            self.tell()

        def tell(self) -> None:
            """The longest phase under way, as inner ones come and go.

            No exception may pass through the builder, Ctrl-C included: it ends the build at the next step.
            """
            try:
                with self.lock:
                    phases = sorted(self.running.items(), key=lambda phase: -phase[1][1])
                if progress and phases:
                    phase, (done, total) = phases[0]
                    progress(f"{name}: {phase.lower()}", done, total)
            except BaseException as error:
                self.stop = error

    return Monitor()


# ------------------------------------------------------------------------------------------------------- running


class Runner:
    """A plan on a GPU, with buffers for one set of shapes at a time.

    graphed: executions after the first with the same shapes replay a CUDA graph. All work goes to `stream`.
    """

    context: trt.IExecutionContext

    def __init__(
        self, plan: bytes, device: torch.device, stream: torch.cuda.Stream | None, graphed: bool = False
    ) -> None:
        """Raises Refused for a plan that TensorRT does not take."""
        trt = library()
        self.device, self.stream, self.graphed = device, stream, graphed
        self._log = _log(trt)
        self._runtime = trt.Runtime(self._log)  # outlives what it makes
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise Refused(f"TensorRT {trt.__version__} does not take the plan{self._log.why()}")
        self.engine = engine
        context = engine.create_execution_context()
        if context is None:
            raise Refused(f"TensorRT cannot make the plan ready to run{self._log.why()}")
        self.context = context
        kinds = {trt.DataType.FLOAT: torch.float32, trt.DataType.INT64: torch.int64, trt.DataType.BOOL: torch.bool}
        self.inputs: dict[str, torch.dtype] = {}
        self.outputs: dict[str, torch.dtype] = {}
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            kind = kinds.get(engine.get_tensor_dtype(name))
            if kind is None:
                raise Refused(f"the plan's {name} is of type {engine.get_tensor_dtype(name)}, which no graph here has")
            into = self.inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else self.outputs
            into[name] = kind
        self.buffers: dict[str, Tensor] = {}
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, **given: Tensor) -> dict[str, Tensor]:
        """Outputs by name, valid until the next call. Inputs of any device; what the plan does not take is left out.

        Queued on the stream, which the caller has made the current one. Raises Refused where TensorRT fails.
        """
        given = {name: given[name] for name in self.inputs}
        if any(name not in self.buffers or self.buffers[name].shape != x.shape for name, x in given.items()):
            self._bind({name: tuple(x.shape) for name, x in given.items()})
            fresh = True
        else:
            fresh = False
        for name, x in given.items():
            self.buffers[name].copy_(x)
        if self.graph is not None:
            self.graph.replay()
        else:
            self._execute()
            if fresh and self.graphed and self.stream is not None:
                self._capture()
        return {name: self.buffers[name] for name in self.outputs}

    def _bind(self, sizes: Mapping[str, Shape]) -> None:
        """Buffers for inputs of these shapes, and for what comes out."""
        self.graph, self.buffers = None, {}
        for name, size in sizes.items():
            if not self.context.set_input_shape(name, size):
                raise Refused(f"the plan does not take {name} of shape {size}{self._log.why()}")
        if left := self.context.infer_shapes():
            raise Refused(f"the plan needs more than it was given: {', '.join(left)}")
        for name, kind in (self.inputs | self.outputs).items():
            self.buffers[name] = torch.empty(tuple(self.context.get_tensor_shape(name)), dtype=kind, device=self.device)
            if not self.context.set_tensor_address(name, self.buffers[name].data_ptr()):
                raise Refused(f"the plan does not take a buffer for {name}{self._log.why()}")

    def _execute(self) -> None:
        if not self.context.execute_async_v3(0 if self.stream is None else self.stream.cuda_stream):
            raise Refused(f"TensorRT could not run the plan{self._log.why()}")

    def _capture(self) -> None:
        """Record one execution, after one has run, as TensorRT asks; shapes and addresses stay from now on."""
        assert self.stream is not None
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using other devices.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self._execute()
        self.graph = graph


# ----------------------------------------------------------------------------------------------- parity and cache


@dataclass(frozen=True)
class Parity:
    """Agreement with torch: the cosine of all values, and the largest error over the largest value; worst output."""

    cosine: float
    max_error: float

    def __str__(self) -> str:
        return f"cosine {self.cosine:.6f}, max error {self.max_error:.1e}"

    def within(self, precision: str) -> bool:
        least, most = LIMITS[precision]
        return self.cosine >= least and self.max_error <= most  # NaN is neither


def parity(found: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> Parity:
    """Of arrays of equal shapes, one by one; what is not finite makes both NaN."""
    cosines, errors = [], []
    for a, b in zip(found, exact, strict=True):
        x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
            return Parity(np.nan, np.nan)
        scale = np.abs(y).max()
        norms = np.linalg.norm(x) * np.linalg.norm(y)
        equal = float(np.array_equal(x, y))
        cosines.append(float(x @ y / norms) if norms else equal)
        errors.append(float(np.abs(x - y).max() / scale) if scale else 1 - equal)
    return Parity(min(cosines), max(errors))


class PlanFile:
    """A plan on disk under a name made of all that it depends on, and beside it, once it was approved, what says so."""

    def __init__(self, folder: Path, name: str, key: Mapping[str, Any]) -> None:
        """key: JSON-able."""
        self.key = json.loads(json.dumps({"format": FORMAT, **key}))
        short = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"{name}-{short}.plan"
        self.approval = self.path.with_suffix(".json")

    def read(self) -> tuple[bytes, Parity] | None:
        """The plan and how it agreed; None where there is none. Raises Refused for what is not what `write` wrote."""
        if not self.approval.exists():
            return None  # a plan alone is what an interrupted run left
        try:
            said = read_json(self.approval)
            key, sha256, agreed = dict(said["key"]), said["sha256"], Parity(**said["parity"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise Refused(f"{self.approval}: damaged, it is not what copedit wrote") from error
        if key != self.key:
            differs = next(name for name in (*self.key, *key) if self.key.get(name) != key.get(name))
            raise Refused(f"{self.path}: foreign, it is for {differs} {key.get(differs)}, not {self.key.get(differs)}")
        try:
            plan = self.path.read_bytes()
        except OSError as error:
            raise Refused(f"{self.path}: cannot be read ({error.strerror})") from error
        if hashlib.sha256(plan).hexdigest() != sha256:
            raise Refused(f"{self.path}: damaged, its hash is not that in {self.approval.name}")
        return plan, agreed

    def write(self, plan: bytes, agreed: Parity) -> None:
        """Raises CopeditError where it cannot."""
        with suppress(OSError):  # what cannot be removed cannot be written either, which says it
            self.approval.unlink()
        write_atomically(self.path, plan)
        said = {"key": self.key, "sha256": hashlib.sha256(plan).hexdigest(), "parity": asdict(agreed)}
        write_atomically(self.approval, (json.dumps(said, indent=2) + "\n").encode())


# -------------------------------------------------------------------------------------------------------- engine


class TensorRTEngine:
    """See `engine.Engine`."""

    def __init__(
        self,
        folder: Path,
        device: str = "auto",
        max_memory: int | None = None,
        progress: Progress | None = None,
        batch: int = 1,
    ):
        """folder: with the ONNX files of `copedit export tensorrt` or `onnx`. Plans that it lacks for this GPU are
        built, checked against torch and kept, which may take minutes; progress is called meanwhile.

        What torch does instead is a warning (UserWarning); `notes` holds what else there is to tell. batch: the
        studies at once that plans are built for; the step takes more in turns.

        Raises CopeditError where TensorRT or a GPU is missing and for a max_memory; Refused for files that must not be
        used, and where not one plan can be.
        """
        if max_memory is not None:
            raise CopeditError("max_memory: the engine tensorrt takes whole volumes; leave it out, or use torch")
        version = str(library().__version__)
        self._device = cuda(device)
        self.device = str(self._device)
        self._manifest = read_manifest(folder)
        self._folder, self._progress = folder, progress
        self.gpu = gpu(self._device)
        self.precision: str = self._manifest["precision"]
        self.config = checkpoint.read_config(folder)
        digests = self._manifest["sha256"]
        self.weights = {"tokenizer": digests[checkpoint.TOKENIZER], "denoiser": digests[checkpoint.DENOISER]}
        self.versions = {"tensorrt": version, "torch": str(torch.__version__)}
        self.batch = batch
        self.notes: list[str] = []
        self.refused: dict[str, Refused] = {}
        self.parity: dict[str, Parity] = {}
        self._full: TorchEngine | None = None
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._runners: dict[str, Runner] = {}
        for graph in GRAPHS:
            try:
                with nullcontext() if self._stream is None else torch.cuda.device(self._device):
                    self._runners[graph] = self._open(graph)
            except (Refused, RuntimeError) as error:
                self.refused[graph] = error if isinstance(error, Refused) else Refused(f"{folder / graph}: {error}")
        if not self._runners:
            raise self.refused[GRAPHS[0]]
        for graph, reason in self.refused.items():
            warnings.warn(f"{reason}; torch does the {_what(graph)} instead", stacklevel=2)
        if not self.refused:
            self._full = None  # only needed to compare with

    @property
    def name(self) -> str:
        """tensorrt, and what torch does."""
        others = [_what(graph) for graph in GRAPHS if graph not in self._runners]
        return f"tensorrt (torch: {', '.join(others)})" if others else "tensorrt"

    def encode(self, images: np.ndarray) -> Encoded:
        return self._do(ENCODER, lambda run: self._encode(run, images), lambda full: full.encode(images))

    def sample(
        self,
        z: np.ndarray,
        prompts: np.ndarray,
        observed: np.ndarray,
        steps: int,
        solver: str,
        progress: Callable[[int, int], None] | None = None,
        prior: np.ndarray | None = None,
    ) -> np.ndarray:
        arguments = z, prompts, observed, steps, solver, progress, prior
        return self._do(STEP, lambda run: self._sample(run, *arguments), lambda full: full.sample(*arguments))

    def decode(self, z: np.ndarray) -> np.ndarray:
        return self._do(DECODER, lambda run: self._decode(run, z), lambda full: full.decode(z))

    def _do(self, graph: str, ours: Callable[[Runner], Any], torchs: Callable[[TorchEngine], Any]) -> Any:
        """By the plan, or from its first failure on by torch."""
        if graph in self._runners:
            try:
                with self._queue():
                    return ours(self._runners[graph])
            except Refused as error:
                del self._runners[graph]
                warnings.warn(f"{error}; torch does the {_what(graph)} from now on", stacklevel=3)
        return torchs(self._torch())

    @contextmanager
    def _queue(self) -> Iterator[None]:
        """On the device and stream of the plans."""
        with torch.no_grad(), nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            yield

    def _encode(self, run: Runner, images: np.ndarray) -> Encoded:
        there = torch.ones(1, images.shape[1], dtype=torch.bool)
        outs = (run(images=torch.from_numpy(one), observed=there) for one in images[:, None])
        return Encoded.join([Encoded(*(_here(out[field.name]) for field in fields(Encoded))) for out in outs])

    def _sample(
        self,
        run: Runner,
        z: np.ndarray,
        prompts: np.ndarray,
        observed: np.ndarray,
        steps: int,
        solver: str,
        progress: Callable[[int, int], None] | None = None,
        prior: np.ndarray | None = None,
    ) -> np.ndarray:
        given = {"z": z, "prompts": prompts, "observed": observed} | ({} if prior is None else {"prior": prior})
        made = []
        for first in range(0, len(z), self.batch):
            some = {name: torch.from_numpy(x[first : first + self.batch]) for name, x in given.items()}
            report = None
            if progress:  # of the steps of all studies
                size = len(some["z"])
                report = lambda i, n, a=first, b=size: progress((a * n + b * i) // len(z), n)  # noqa: E731
            made.append(self._loop(run, some, steps, solver, report))
        return np.concatenate(made)

    def _loop(
        self,
        run: Runner,
        given: Mapping[str, Tensor],
        steps: int,
        solver: str,
        progress: Callable[[int, int], None] | None,
    ) -> np.ndarray:
        """As many studies as a plan takes. given: z, prompts, observed and prior."""
        config = self.config.diffusion
        fixed = {name: x.to(self._device) for name, x in given.items()}
        now = fixed.pop("z")
        times = torch.from_numpy(schedule.timesteps(config, steps)).to(self._device)
        coefficients = torch.from_numpy(schedule.step_coefficients(config, steps, solver)).to(self._device)
        batch, previous = len(now), torch.zeros_like(now)
        for i in range(steps):
            each = {"t": times[i].expand(batch), "coefficients": coefficients[i].expand(batch, -1, -1)}
            out = run(z=now, previous=previous, **each, **fixed)
            now, previous = out["next"], out["prediction"]
            if progress:
                progress(i + 1, steps)
        return _here(now)

    def _decode(self, run: Runner, z: np.ndarray) -> np.ndarray:
        return np.concatenate([_here(run(z=torch.from_numpy(one))["images"]) for one in z[:, None]])

    def _torch(self) -> TorchEngine:
        """The same weights on torch."""
        if self._full is None:
            from copedit_rt.engines.torch_engine import TorchEngine

            config, tokenizer, _ = checkpoint.load_tokenizer(self._folder)
            _, denoiser, _ = checkpoint.load_denoiser(self._folder)
            self._full = TorchEngine(config, tokenizer, denoiser, self._device)
        return self._full

    def _key(self, graph: str) -> dict[str, Any]:
        """All that a plan depends on."""
        digests = self._manifest["sha256"]
        return {
            "graph": digests[graph],
            "weights": digests[WEIGHTS[graph]],
            "precision": self.precision,
            "shapes": shapes(self.config, graph, self.batch),
            "TensorRT": self.versions["tensorrt"],
            "GPU": self.gpu,
        }

    def file(self, graph: str) -> PlanFile:
        """Where the plan of a graph is kept."""
        return PlanFile(self._folder / FOLDER, _what(graph), self._key(graph))

    def _open(self, graph: str) -> Runner:
        """The plan that is there, or a new one. Raises Refused where neither can be used."""
        cached = self.file(graph)
        try:
            if found := cached.read():
                run = Runner(found[0], self._device, self._stream, graphed=graph == STEP)
                self.parity[graph] = found[1]
                return run
        except Refused as error:
            sentence = str(error) if str(cached.path.parent) in str(error) else f"{cached.path}: {error}"
            self.notes.append(f"{sentence}; it is built again")
        begin = time.monotonic()
        plan = self._build(graph)
        run = Runner(plan, self._device, self._stream, graphed=graph == STEP)
        agreed = self._compare(graph, run)
        if not agreed.within(self.precision):
            least, most = LIMITS[self.precision]
            raise Refused(
                f"{self._folder / graph}: what TensorRT makes of it does not agree with torch ({agreed}; in "
                f"{self.precision} at least {least} and at most {most} are accepted)"
            )
        self.parity[graph] = agreed
        self.notes.append(
            f"{_what(graph)}: plan built in {time.monotonic() - begin:.0f} s, agrees with torch: {agreed}"
        )
        try:
            cached.write(plan, agreed)
        except CopeditError as error:
            self.notes.append(f"{error}; without it the next start builds the plan again")
        return run

    def _build(self, graph: str) -> bytes:
        # Entries are good for one TensorRT on one GPU, and so is the name.
        kind = hashlib.sha256(f"{self.versions['tensorrt']} {self.gpu}".encode()).hexdigest()[:16]
        path = self._folder / FOLDER / f"timing-{kind}.cache"
        before = path.read_bytes() if path.is_file() else b""
        plan, timing = build(self._folder / graph, shapes(self.config, graph, self.batch), before, self._progress)
        with suppress(CopeditError):  # it only saves time; where the plan cannot be written either, that is said
            write_atomically(path, timing)
        return plan

    def _compare(self, graph: str, run: Runner) -> Parity:
        """A plan beside torch, on inputs drawn at random."""
        config, draw, full = self.config, np.random.default_rng(0), self._torch()
        m, c = len(config.elements), config.tokenizer
        z = draw.standard_normal((1, m, c.latent_channels, *config.latent), np.float32)
        if self._progress:
            self._progress(f"{_what(graph)}: comparing with torch", 0, 1)
        if graph == ENCODER:
            images = draw.random((1, m - 1, 1, *config.image), np.float32)
            with self._queue():
                encoded = self._encode(run, images)
            return parity(_arrays(encoded), _arrays(full.encode(images)))
        if graph == STEP:
            prompts = draw.standard_normal((1, 3, c.prompt_dim), np.float32)
            observed = np.arange(m)[None] == 0
            # Of second order, whose second step reads the prediction of the first.
            prior = draw.standard_normal(z.shape, np.float32) if self.config.denoiser.prior else None
            arguments = z, prompts, observed, 2, "dpm2m", None, prior
            with self._queue():
                ours = self._sample(run, *arguments)
            if not np.array_equal(ours[observed], z[observed]):
                raise Refused(f"{self._folder / graph}: what TensorRT makes of it changes observed elements")
            return parity([ours[~observed]], [full.sample(*arguments)[~observed]])
        if c.quantise:  # from codes themselves: between two of them, rounding would decide
            vae = full.tokenizer
            codes = vae.codebook[torch.from_numpy(draw.integers(0, c.codes, (1, m, *config.latent)))]
            z = vae.normalise(codes.movedim(-1, 2)).float().cpu().numpy()
        with self._queue():
            images = self._decode(run, z)
        return parity([images], [full.decode(z)])


def _what(graph: str) -> str:
    """encoder, step or decoder."""
    return Path(graph).stem


def _arrays(encoded: Encoded) -> list[np.ndarray]:
    return [getattr(encoded, field.name) for field in fields(Encoded)]


def _here(x: Tensor) -> np.ndarray:
    """A copy: the next call writes into the same buffers."""
    return x.to("cpu", torch.float32, copy=True).numpy()
