"""Stands in for the module `tensorrt` on the CPU: ONNX Runtime computes, at the addresses that it is given.

Only what copedit_rt/engines/tensorrt_engine.py calls; a test holds the names against the real API. `faults` makes a
call fail for the graphs named there, as TensorRT does: it returns None or False.
"""

import ctypes
import io
import json
from abc import ABC, abstractmethod
from enum import Enum, IntEnum
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

__version__ = "0.0"
faults: dict[str, str] = {}  # what fails -> the graph (file name) for which it does
built: list[str] = []  # graphs, in the order of their builds
timings: list[bytes] = []  # timing caches that were accepted

MAGIC = b"stand-in plan\n"


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(Enum):
    TF32 = 0


class LayerType(Enum):
    ATTENTION_INPUT = 0
    CONVOLUTION = 1


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class DataType(Enum):
    FLOAT = np.float32
    INT64 = np.int64
    BOOL = np.bool_


class ILogger(ABC):
    """Of the real interfaces every method is to be written by whoever inherits; here leaving one out is refused."""

    class Severity(Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2

    @abstractmethod
    def log(self, severity, msg): ...


class IProgressMonitor(ABC):
    @abstractmethod
    def phase_start(self, phase_name, parent_phase, num_steps): ...

    @abstractmethod
    def step_complete(self, phase_name, step): ...

    @abstractmethod
    def phase_finish(self, phase_name): ...


class ITensor:
    def __init__(self, name):
        self.name = name


class IAttention:
    decomposable = False


class ILayer:
    def __init__(self, type_):
        self.type = type_


class IAttentionBoundaryLayer(ILayer):
    @property
    def attention(self):
        return self.__dict__.setdefault("held", IAttention())


class INetworkDefinition:
    def __init__(self):
        self._name, self._model, self._inputs, self._layers = "", None, [], []

    @property
    def num_inputs(self):
        return len(self._inputs)

    @property
    def num_layers(self):
        return len(self._layers)

    def get_input(self, index):
        return self._inputs[index]

    def get_layer(self, index):
        return self._layers[index]


class ParserError:
    def node_name(self):
        return "node_17"

    def desc(self):
        return "no such operator\nand more"


class OnnxParser:
    def __init__(self, network, logger):
        self._network, self.num_errors = network, 0

    def parse(self, model, path=None):
        found, network = onnx.load(io.BytesIO(model), load_external_data=False), self._network
        network._name = Path(path).name
        if faults.get("parse") == network._name:
            self.num_errors = 1
            return False
        onnx.load_external_data_for_model(found, str(Path(path).parent))
        network._model = found
        network._inputs = [ITensor(value.name) for value in found.graph.input]
        kinds = {"Attention": LayerType.ATTENTION_INPUT}
        network._layers = [ILayer(kinds.get(node.op_type, LayerType.CONVOLUTION)) for node in found.graph.node]
        return True

    def get_error(self, index):
        return ParserError()


class IOptimizationProfile:
    def __init__(self):
        self._ranges = {}

    def set_shape(self, input, min, opt, max):
        assert len(min) == len(opt) == len(max) and all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True))
        self._ranges[input] = [list(min), list(max)]


class ITimingCache:
    def __init__(self, content):
        self._content = content

    def serialize(self):
        return self._content + b"+"


class IBuilderConfig:
    progress_monitor = None

    def __init__(self):
        self._profile, self._cleared = None, []

    def clear_flag(self, flag):
        self._cleared.append(flag)

    def add_optimization_profile(self, profile):
        self._profile = profile
        return 0

    def create_timing_cache(self, serialized_timing_cache):
        return None if serialized_timing_cache.startswith(b"damaged") else ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        timings.append(cache._content)
        return True


class Builder:
    def __init__(self, logger):
        self._logger = logger

    def create_network(self, flags=0):
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition()

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 2)
        if not monitor.step_complete("Building engine", 0):
            return None
        monitor.phase_finish("Building engine")
        fused = [i for i in network._layers if i.type == LayerType.ATTENTION_INPUT and not i.attention.decomposable]
        if faults.get("build") == network._name or fused:
            self._logger.log(ILogger.Severity.ERROR, "no implementation\nand a long list")
            return None
        assert BuilderFlag.TF32 in config._cleared
        built.append(network._name)
        head = {"name": network._name, "ranges": config._profile._ranges}
        return MAGIC + json.dumps(head).encode() + b"\n" + network._model.SerializeToString()


class IExecutionContext:
    def __init__(self, engine):
        self._engine, self._shapes, self._addresses = engine, {}, {}

    def set_input_shape(self, name, shape):
        least, most = self._engine._ranges[name]
        if len(shape) != len(least) or any(not a <= n <= b for a, n, b in zip(least, shape, most, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self):
        return [i.name for i in self._engine._session.get_inputs() if i.name not in self._shapes]

    def get_tensor_shape(self, name):
        if name in self._shapes:
            return self._shapes[name]
        sizes = {}
        for value in self._engine._session.get_inputs():
            sizes |= dict(zip(value.shape, self._shapes[value.name], strict=True))
        (found,) = (value for value in self._engine._session.get_outputs() if value.name == name)
        return tuple(sizes.get(n, n) for n in found.shape)

    def set_tensor_address(self, name, memory):
        self._addresses[name] = memory
        return faults.get("address") != self._engine._name

    def _at(self, name):
        """The memory of a tensor as an array."""
        shape, kind = self.get_tensor_shape(name), np.dtype(self._engine.get_tensor_dtype(name).value)
        size = int(np.prod(shape)) * kind.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self._addresses[name]), kind).reshape(shape)

    def execute_async_v3(self, stream_handle):
        if faults.get("execute") == self._engine._name:
            return False
        session = self._engine._session
        values = session.run(None, {value.name: self._at(value.name) for value in session.get_inputs()})
        for out, value in zip(session.get_outputs(), values, strict=True):
            if faults.get("wrong") == self._engine._name:
                value.reshape(-1)[value.size // 2 :] += 0.1 * np.abs(value).max()
            if faults.get("observed") == self._engine._name:
                value = value + 1
            if faults.get("nan") == self._engine._name:
                value.reshape(-1)[value.size // 2 :] = np.nan
            self._at(out.name)[...] = value
        return True


class ICudaEngine:
    def __init__(self, plan):
        head, model = plan.removeprefix(MAGIC).split(b"\n", 1)
        self._name, self._ranges = json.loads(head)["name"], json.loads(head)["ranges"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options)
        self._inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._tensors = [*self._inputs, *outputs]

    @property
    def num_io_tensors(self):
        return len(self._tensors)

    def get_tensor_name(self, index):
        return self._tensors[index].name

    def get_tensor_dtype(self, name):
        kinds = {"tensor(float)": DataType.FLOAT, "tensor(int64)": DataType.INT64, "tensor(bool)": DataType.BOOL}
        (found,) = (value.type for value in self._tensors if value.name == name)
        return kinds[found]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in {value.name for value in self._inputs} else TensorIOMode.OUTPUT

    def create_execution_context(self):
        return None if faults.get("context") == self._name else IExecutionContext(self)


class Runtime:
    def __init__(self, logger):
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        if not serialized_engine.startswith(MAGIC):
            self._logger.log(ILogger.Severity.ERROR, "not a plan")
            return None
        return ICudaEngine(serialized_engine)
