"""From published weights to the files that `features` takes: Inception v3 for FID, MedicalNet and I3D for FVD.

The architectures are written down here from their papers; the names of the weights are those under which they are
published (torchvision's Inception v3, MedicalNet's ResNets, the PyTorch version of I3D). Nothing is downloaded. What
comes out is TorchScript with resizing and scaling inside, see `features` for what it is called with.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from copedit_rt import checkpoint
from copedit_rt.errors import CopeditError
from copedit_rt.files import is_file, write_atomically

Size = int | tuple[int, int]
EPS = 1e-3  # of the batch norms of both Inceptions


# -------------------------------------------------------------------------------------------------- Inception v3 (2D)


class Unit2d(nn.Module):
    """Convolution without bias, batch norm, ReLU. pad: "same" keeps the size."""

    def __init__(self, inside: int, outside: int, kernel: Size = 1, stride: int = 1, same: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if same else 0
        self.conv = nn.Conv2d(inside, outside, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


# Branches of a block: (name, channels, kernel, stride) one after the other; "average" or "max" pools first, a list of
# two is a fork whose ends are joined. A stride of 2 goes without padding.
Step = tuple[str, int, Size, int]
Branch = Sequence[Any]


def _chain(prefix: str, *units: tuple[int, Size]) -> list[Step]:
    return [(f"{prefix}_{i + 1}", channels, kernel, 1) for i, (channels, kernel) in enumerate(units)]


def _a(pool: int) -> list[Branch]:
    double = _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))
    five = _chain("branch5x5", (48, 1), (64, 5))
    return [[("branch1x1", 64, 1, 1)], five, double, ["average", ("branch_pool", pool, 1, 1)]]


def _b() -> list[Branch]:
    double = [*_chain("branch3x3dbl", (64, 1), (96, 3)), ("branch3x3dbl_3", 96, 3, 2)]
    return [[("branch3x3", 384, 3, 2)], double, ["max"]]


def _c(narrow: int) -> list[Branch]:
    wide, tall, n = (1, 7), (7, 1), narrow
    double = _chain("branch7x7dbl", (n, 1), (n, tall), (n, wide), (n, tall), (192, wide))
    single = _chain("branch7x7", (n, 1), (n, wide), (192, tall))
    return [[("branch1x1", 192, 1, 1)], single, double, ["average", ("branch_pool", 192, 1, 1)]]


def _d() -> list[Branch]:
    seven = [*_chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1))), ("branch7x7x3_4", 192, 3, 2)]
    return [[("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)], seven, ["max"]]


def _e() -> list[Branch]:
    def fork(name: str) -> list[Step]:
        return [(f"{name}a", 384, (1, 3), 1), (f"{name}b", 384, (3, 1), 1)]

    double = [*_chain("branch3x3dbl", (448, 1), (384, 3)), fork("branch3x3dbl_3")]
    three = [("branch3x3_1", 384, 1, 1), fork("branch3x3_2")]
    return [[("branch1x1", 320, 1, 1)], three, double, ["average", ("branch_pool", 192, 1, 1)]]


class Block2d(nn.Module):
    """Branches side by side, joined."""

    def __init__(self, inside: int, branches: Sequence[Branch]):
        super().__init__()
        self.branches, self.outside = branches, 0
        for branch in branches:
            channels = inside
            for step in branch:
                for name, outside, kernel, stride in step if isinstance(step, list) else [step] * (type(step) is tuple):
                    self.add_module(name, Unit2d(channels, outside, kernel, stride, stride == 1))
                    self.outside += outside * isinstance(step, list)
                channels = step[1] if type(step) is tuple else channels
            self.outside += channels * (not isinstance(branch[-1], list))

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for branch in self.branches:
            y = [x]
            for step in branch:
                if step == "average":
                    y = [F.avg_pool2d(y[0], 3, 1, 1)]
                elif step == "max":
                    y = [F.max_pool2d(y[0], 3, 2)]
                else:
                    y = [getattr(self, name)(y[0]) for name, *_ in (step if isinstance(step, list) else [step])]
            out += y
        return torch.cat(out, 1)


BLOCKS = {
    **{f"Mixed_5{x}": _a(pool) for x, pool in zip("bcd", (32, 64, 64), strict=True)},
    "Mixed_6a": _b(),
    **{f"Mixed_6{x}": _c(n) for x, n in zip("bcde", (128, 160, 160, 192), strict=True)},
    "Mixed_7a": _d(),
    **{f"Mixed_7{x}": _e() for x in "bc"},
}
STEM = (
    ("Conv2d_1a_3x3", 32, 3, 2, False),
    ("Conv2d_2a_3x3", 32, 3, 1, False),
    ("Conv2d_2b_3x3", 64, 3, 1, True),
    ("Conv2d_3b_1x1", 80, 1, 1, True),
    ("Conv2d_4a_3x3", 192, 3, 1, False),
)


class Inception(nn.Module):
    """Inception v3 (Szegedy et al. 2016) up to its 2048 pooled features: slices [N, 3, H, W] in 0..1 -> [N, 2048].

    Slices are resized to 299 x 299 and brought to -1..1, as the published weights have it.
    """

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for name, outside, kernel, stride, same in STEM:
            self.add_module(name, Unit2d(channels, outside, kernel, stride, same))
            channels = outside
        for name, branches in BLOCKS.items():
            block = Block2d(channels, branches)
            self.add_module(name, block)
            channels = block.outside

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        return self.features(x)

    def features(self, x: Tensor) -> Tensor:
        for name, *_ in STEM:
            x = getattr(self, name)(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, 2)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


# ------------------------------------------------------------------------------------------------------------ I3D (3D)


def _same(x: Tensor, kernels: list[int], strides: list[int], value: float) -> Tensor:
    """Padded (depth, rows, columns) so that the output has a stride-th of the size, rounded up; more behind."""
    pads: list[int] = []
    for i in (2, 1, 0):
        rest = x.size(2 + i) % strides[i]
        total = max(kernels[i] - (strides[i] if rest == 0 else rest), 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


class Unit3d(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inside: int, outside: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.kernels, self.strides = [kernel] * 3, [stride] * 3
        self.conv3d = nn.Conv3d(inside, outside, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(outside, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(_same(x, self.kernels, self.strides, 0.0))))


class Pool3d(nn.Module):
    def __init__(self, kernels: Sequence[int], strides: Sequence[int]):
        super().__init__()
        self.kernels, self.strides = list(kernels), list(strides)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(_same(x, self.kernels, self.strides, -1e30), self.kernels, self.strides)


class Block3d(nn.Module):
    """1x1x1; 1x1x1 and 3x3x3; the same, narrower; a maximum and 1x1x1; joined."""

    def __init__(self, inside: int, sizes: Sequence[int]):
        super().__init__()
        a, b, c, d, e, f = sizes
        self.b0, self.b1a, self.b1b = Unit3d(inside, a), Unit3d(inside, b), Unit3d(b, c, 3)
        self.b2a, self.b2b, self.b3b = Unit3d(inside, d), Unit3d(d, e, 3), Unit3d(inside, f)
        self.pool = Pool3d((3, 3, 3), (1, 1, 1))
        self.outside = a + c + e + f

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.pool(x))), 1)


PLANE = ((1, 3, 3), (1, 2, 2))  # kernels and strides of a pool in the plane
I3D_BLOCKS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("Mixed_3b", (64, 96, 128, 16, 32, 32)),
    ("Mixed_3c", (128, 128, 192, 32, 96, 64)),
    ("Mixed_4b", (192, 96, 208, 16, 48, 64)),
    ("Mixed_4c", (160, 112, 224, 24, 64, 64)),
    ("Mixed_4d", (128, 128, 256, 24, 64, 64)),
    ("Mixed_4e", (112, 144, 288, 32, 64, 64)),
    ("Mixed_4f", (256, 160, 320, 32, 128, 128)),
    ("Mixed_5b", (256, 160, 320, 32, 128, 128)),
    ("Mixed_5c", (384, 192, 384, 48, 128, 128)),
)


class I3D(nn.Module):
    """I3D (Carreira & Zisserman 2017) up to its 1024 pooled features: volumes [N, 3, D, H, W] in 0..1 -> [N, 1024].

    The plane is resized to 224 x 224, values are brought to -1..1; depth stays as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential()
        self.parts.add_module("Conv3d_1a_7x7", Unit3d(3, 64, 7, 2))
        self.parts.add_module("MaxPool3d_2a_3x3", Pool3d(*PLANE))
        self.parts.add_module("Conv3d_2b_1x1", Unit3d(64, 64))
        self.parts.add_module("Conv3d_2c_3x3", Unit3d(64, 192, 3))
        pools = {"Mixed_3b": PLANE, "Mixed_4b": ((3, 3, 3), (2, 2, 2)), "Mixed_5b": ((2, 2, 2), (2, 2, 2))}
        channels = 192
        for name, sizes in I3D_BLOCKS:
            if name in pools:
                self.parts.add_module(f"before_{name}", Pool3d(*pools[name]))
            block = Block3d(channels, sizes)
            self.parts.add_module(name, block)
            channels = block.outside

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * F.interpolate(x, [x.size(2), 224, 224], mode="trilinear", align_corners=False) - 1
        return self.parts(x).mean((2, 3, 4))


# ---------------------------------------------------------------------------------------------------------- MedicalNet


class MedicalNet(nn.Module):
    """A ResNet of MedicalNet (Chen et al. 2019) up to its pooled features: volumes [N, 3, D, H, W] -> [N, 512 or 2048].

    Volumes are brought to mean 0 and deviation 1, each by itself, as it was trained; the three channels are one.
    """

    def __init__(self, name: str):
        super().__init__()
        from monai.networks.nets import ResNetFeatures

        self.net = ResNetFeatures(name, pretrained=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.instance_norm(x[:, :1]))[-1].mean((2, 3, 4))


def resnet_of(state: Mapping[str, Tensor]) -> str:
    """Which ResNet has these weights, by the blocks of its four layers. Raises CopeditError for none."""
    blocks = [len({k.split(".")[1] for k in state if k.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4)]
    deep = any(".conv3." in k for k in state)
    known = {
        (False, (1, 1, 1, 1)): "resnet10",
        (False, (2, 2, 2, 2)): "resnet18",
        (False, (3, 4, 6, 3)): "resnet34",
        (True, (3, 4, 6, 3)): "resnet50",
        (True, (3, 4, 23, 3)): "resnet101",
        (True, (3, 8, 36, 3)): "resnet152",
    }
    try:
        return known[deep, tuple(blocks)]  # type: ignore[index]
    except KeyError:
        raise CopeditError(
            f"layers of {blocks} blocks are no ResNet of MedicalNet's; give its published file"
        ) from None


def _medicalnet(state: Mapping[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    try:
        made = MedicalNet(resnet_of(state))
    except ImportError as error:
        raise CopeditError("medicalnet needs MONAI: install the extra `train`") from error
    return made, made.net


def _inception(state: Mapping[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    made = Inception()
    return made, made


def _i3d(state: Mapping[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    made = I3D()
    return made, made.parts


@dataclass(frozen=True)
class Kind:
    """build: of the published weights, the network, and the part of it whose weights they are. spare: beginnings of the
    names of weights behind the features. example: a size of what it is called with. option: which takes it."""

    build: Callable[[Mapping[str, Tensor]], tuple[nn.Module, nn.Module]]
    spare: tuple[str, ...]
    example: tuple[int, ...]
    option: str


NETWORKS = {
    "inception": Kind(_inception, ("AuxLogits.", "fc."), (2, 3, 96, 96), "--fid-network"),
    "i3d": Kind(_i3d, ("logits.",), (1, 3, 16, 64, 64), "--fvd-network"),
    "medicalnet": Kind(_medicalnet, ("fc.", "conv_seg."), (1, 3, 16, 64, 64), "--fvd-network"),
}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a file of `torch.save` that holds nothing but tensors and containers.

    Raises CopeditError for a file that is missing or holds anything else.
    """
    if not is_file(path):
        raise CopeditError(f"{path}: no such file; give the published weights")
    if path.suffix == ".safetensors":
        state: Any = checkpoint.read_tensors(path)[0]
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, MemoryError) as error:
            raise CopeditError(f"{path}: cannot be read ({error})") from error
        except Exception as error:
            raise CopeditError(f"{path}: not a file of weights alone; give the published weights") from error
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise CopeditError(f"{path}: holds no weights by name; give the published weights")
    return {name.removeprefix("module."): x for name, x in state.items()}


def convert(kind: str, weights: Path, output: Path) -> str:
    """Write the network of `NETWORKS` with published weights as TorchScript; returns the option that takes it.

    Raises CopeditError for another kind, and weights that are not its own.
    """
    if kind not in NETWORKS:
        raise CopeditError(f"network {kind!r} is unknown; choose one of {', '.join(NETWORKS)}")
    known, state = NETWORKS[kind], read_weights(weights)
    made, part = known.build(state)
    wanted = part.state_dict()
    given = {name: x for name, x in state.items() if not name.startswith(known.spare)}
    counters = {name: x for name, x in wanted.items() if name.endswith("num_batches_tracked")}
    for name in (*wanted, *given):
        if name not in given and name not in counters:
            raise CopeditError(f"{weights}: not the weights of {kind} ({name} is missing); give its published file")
        if name not in wanted:
            raise CopeditError(f"{weights}: not the weights of {kind} ({name} is unknown); give its published file")
        if name in given and given[name].shape != wanted[name].shape:
            raise CopeditError(f"{weights}: not the weights of {kind} ({name} has another shape); give the published")
    part.load_state_dict(counters | given)
    made.eval().requires_grad_(False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but what `features` takes
        # Padding follows the size: traced, I3D would keep that of the example.
        script = (
            torch.jit.script(made)
            if kind == "i3d"
            else torch.jit.trace(made, torch.rand(known.example), check_trace=False)
        )
        torch.jit.save(script, buffer)
    write_atomically(output, buffer.getvalue())
    return known.option
