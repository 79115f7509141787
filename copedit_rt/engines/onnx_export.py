"""A model as ONNX files: encoder with prompt heads, one sampler step, decoder (opset 23, standard operators).

The folder is a model folder like any other, with three graphs and a manifest beside the weights. The graphs hold no
weights of their own: their external data are the safetensors files, at the offsets that these give. So every engine
reads the same bytes, and weights that were exchanged after the export are noticed.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import copedit_kernels
import copedit_rt
from copedit_rt import checkpoint
from copedit_rt.checkpoint import digest
from copedit_rt.config import ModelConfig
from copedit_rt.engines.onnx_engine import DECODER, ENCODER, FORMAT, MANIFEST, PRECISIONS, STEP
from copedit_rt.errors import CopeditError
from copedit_rt.files import new_folder, write_atomically
from copedit_rt.networks.denoiser import MDiT3D
from copedit_rt.networks.tokenizer import CoPeVAE
from copedit_rt.trained import TrainedOn

OPSET = 23
DISTANCES = 2**22  # that the decoder holds at once per image, where the kernel holds none: 16 MiB


class Encoder(nn.Module):
    """Observed images to latents and to what the prompt heads say."""

    def __init__(self, tokenizer: CoPeVAE):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor, observed: Tensor) -> tuple[Tensor, ...]:
        """images [B, k, 1, H, W, D] in 0..1; observed [B, k], at least one True a sample: those that count.

        Returns normalised latents [B, k, 8, h, w, d], prompts [B, 3, P], and the logits count [B, m-1], missing [B, m]
        and alone [B, k, m] (of each image by itself), all float32. What is not observed does not touch the others.
        """
        vae = self.tokenizer
        z = vae.encode(images.to(vae.encoder.out.weight.dtype)).float()
        each = vae.prompts_of_each(z)
        kept = each.where(observed[..., None, None], 0)
        prompts = kept.sum(1) / observed.sum(1)[:, None, None]
        count, missing, _ = vae.assess(prompts)
        alone = vae.assess(each.flatten(0, 1))[1].unflatten(0, images.shape[:2])
        return vae.normalise(z), prompts, count, missing, alone


class Step(nn.Module):
    """The denoiser and the partial update of its latents."""

    def __init__(self, denoiser: MDiT3D):
        super().__init__()
        self.denoiser = denoiser

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        prompts: Tensor,
        observed: Tensor,
        previous: Tensor,
        coefficients: Tensor,
        prior: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """z [B, m, 8, h, w, d] normalised latents, noise in the missing elements at first; t [B] int64 timesteps;
        prompts [B, 3, P]; observed [B, m] bool; previous: `prediction` of the step before, zeros at first;
        coefficients [B, 2, 2]: this step's of `schedule.step_coefficients`; the samples of a batch may be at different
        steps; prior [B, m, 8, h, w, d]: see `MDiT3D.predict`, for networks that take one.

        Returns (the latents after the step, whose observed elements keep their bits; prediction), both float32.
        """
        x0 = self.denoiser(z.to(self.denoiser.embed.weight.dtype), t, prompts, observed, prior=prior).to(z.dtype)
        keep, rate, carry, back = coefficients.flatten(1).view(-1, 4, *[1] * (z.ndim - 1)).unbind(1)
        moved = carry * (keep * z + rate * x0) + back * previous
        return z.where(observed[:, :, None, None, None, None], moved), x0


class Decoder(nn.Module):
    """Latents to images, by way of their nearest codes where the configuration says so."""

    def __init__(self, tokenizer: CoPeVAE, joint: bool):
        super().__init__()
        self.tokenizer, self.joint = tokenizer, joint

    def forward(self, z: Tensor) -> Tensor:
        """Normalised latents [B, k, 8, h, w, d] (cardiac: of all slabs) -> images [B, k, 1, H, W, D] in float32."""
        vae = self.tokenizer
        z = vae.denormalise(z)
        codes = nearest(z, vae.codebook) if vae.config.quantise else z
        return vae.decode(codes.to(vae.decoder.inp.weight.dtype), self.joint).float()


class Upsample(nn.Module):
    """A transposed convolution of kernel 4, stride 2 (3 and 1 along some axes) as an ordinary one; the same sums.

    Along an axis of stride 2 an even position sees two of the four taps, an odd one the other two. One convolution of
    kernel 2 computes both kinds as channels (eight kinds in 3D), which are then interleaved.
    """

    def __init__(self, layer: nn.ConvTranspose3d):
        super().__init__()
        self.stride = layer.stride
        inputs, outputs, *kernel = layer.weight.shape
        taps = [n // s for n, s in zip(kernel, self.stride, strict=True)]
        split = [n for pair in zip(taps, self.stride, strict=True) for n in pair]
        kinds = layer.weight.detach().flip(2, 3, 4).reshape(inputs, outputs, *split).permute(3, 5, 7, 1, 0, 2, 4, 6)
        self.weight = nn.Parameter(kinds.reshape(-1, inputs, *taps).contiguous())
        assert layer.bias is not None
        self.bias = nn.Parameter(layer.bias.detach().repeat(math.prod(self.stride)))

    def forward(self, x: Tensor) -> Tensor:
        kinds = nn.functional.conv3d(x, self.weight, self.bias, padding=1).chunk(math.prod(self.stride), dim=1)
        offsets = itertools.product(*(range(s) for s in self.stride))
        parts = [
            kind[:, :, i : i + x.shape[2], j : j + x.shape[3], k : k + x.shape[4]]
            for kind, (i, j, k) in zip(kinds, offsets, strict=True)
        ]
        for axis in (4, 3, 2):
            s = self.stride[axis - 2]
            parts = [torch.stack(parts[n : n + s], axis + 1).flatten(axis, axis + 1) for n in range(0, len(parts), s)]
        return parts[0]


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Nearest codes of latents [B, k, c, h, w, d], same shape; the leftmost on ties.

    As `copedit_kernels.reference.nearest_code`, but so many rows along h at a time, since a graph has no loop.
    """
    columns = codebook.T.unbind()
    row = math.prod(z.shape[4:]) * len(codebook)
    parts = []
    for part in z.split(max(1, DISTANCES // row), dim=3):
        distance = None
        for channel, code in zip(part.unbind(2), columns, strict=True):
            difference = channel[..., None] - code
            square = difference * difference
            distance = square if distance is None else distance + square
        assert distance is not None
        parts.append(distance.argmin(-1))
    return codebook[torch.cat(parts, dim=2)].movedim(-1, 2)


def export_onnx(model: str | Path, output: Path, precision: str = "float32") -> dict[str, Any]:
    """Write the model as ONNX into the new folder `output`; JSON-able: the folder and the bytes of each file.

    precision: float32, float16 or bfloat16, of the weights and of what is computed between inputs and outputs, which
    are float32; prompts, norms and the choice of codes stay in float32. There is a whole model in the end or none.

    Raises CopeditError for what is no model or cannot be exported, an unknown precision, an output folder that is not
    empty or cannot be written, and a missing extra `export`.
    """
    if precision not in PRECISIONS:
        raise CopeditError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    with new_folder(output) as part:
        config, tokenizer, denoiser = _load(checkpoint.locate(model))
        _narrow(tokenizer, denoiser, getattr(torch, precision))
        if prior := checkpoint.load_prior(checkpoint.locate(model), config):
            prior.save(part)
        if trained := TrainedOn.load(checkpoint.locate(model)):
            trained.save(part)
        _write(part, config, tokenizer, denoiser, precision)
    return {
        "model": config.name,
        "folder": str(output.absolute()),
        "precision": precision,
        "opset": OPSET,
        "files": {path.name: path.stat().st_size for path in sorted(output.iterdir())},
    }


def export_tensorrt(
    model: str | Path,
    output: Path,
    precision: str = "float16",
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """`export_onnx`, and the plans that TensorRT makes of it for the GPU here, checked against torch; JSON-able.

    What TensorRT cannot do, or does otherwise than torch, has no plan and is a warning (UserWarning): torch does it.
    progress: called with what is being done, its steps done and in all. Nothing is left behind where this fails.

    Raises CopeditError as `export_onnx` does, and where TensorRT or a GPU is missing or makes no plan at all.
    """
    from copedit_rt.engines import tensorrt_engine

    tensorrt_engine.library()  # before the minutes that the rest takes
    tensorrt_engine.cuda(device)
    with new_folder(output) as part:
        report = export_onnx(model, part, precision)
        engine = tensorrt_engine.TensorRTEngine(part, device, progress=progress)
    files = {p.relative_to(output).as_posix(): p.stat().st_size for p in sorted(output.rglob("*")) if p.is_file()}
    agreed = {Path(graph).stem: asdict(parity) for graph, parity in engine.parity.items()}
    versions = engine.versions | {"gpu": engine.gpu}
    return report | {"folder": str(output.absolute()), "files": files, "parity": agreed, "versions": versions}


def _load(folder: Path) -> tuple[ModelConfig, CoPeVAE, MDiT3D]:
    config, tokenizer, _ = checkpoint.load_tokenizer(folder)
    if config.denoiser.backbone == "unet":
        raise CopeditError(f"model {config.name}: the backbone unet cannot be exported; the transformers can")
    if copedit_kernels.implementation() == "triton":
        raise CopeditError("COPEDIT_KERNELS=triton: an export traces the reference; unset the variable")
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise CopeditError(f"{missing[0]} is not installed; pip install 'copedit[export]' adds what an export needs")
    _, denoiser, _ = checkpoint.load_denoiser(folder)
    assert isinstance(denoiser, MDiT3D)
    return config, tokenizer, denoiser


def _narrow(tokenizer: CoPeVAE, denoiser: MDiT3D, dtype: torch.dtype) -> None:
    """What the file says about precision: buffers, prompt encoders, heads and codes keep float32."""
    for weight in (*tokenizer.encoder.parameters(), *tokenizer.decoder.parameters(), *denoiser.parameters()):
        weight.data = weight.data.to(dtype)


def _split_upsampling(tokenizer: CoPeVAE) -> None:
    """Transposed convolutions as ordinary ones: those in three dimensions do not exist in bfloat16 in TensorRT.

    Not in other precisions: on a CPU, ONNX Runtime takes twice as long for the last one of demo-brain.
    """
    for level in tokenizer.decoder.levels:
        assert isinstance(level, nn.Sequential)
        for i, layer in enumerate(level):
            if isinstance(layer, nn.ConvTranspose3d):
                level[i] = Upsample(layer)


def _write(folder: Path, config: ModelConfig, tokenizer: CoPeVAE, denoiser: MDiT3D, precision: str) -> None:
    checkpoint.save(folder, config, tokenizer, denoiser)
    stored = {
        "tokenizer": _stored(folder / checkpoint.TOKENIZER),
        "denoiser": _stored(folder / checkpoint.DENOISER),
    }
    if precision == "bfloat16":
        _split_upsampling(tokenizer)  # whose weights, in another order, are in the graph
    for name, (module, inputs, outputs, dynamic) in graphs(config, tokenizer, denoiser).items():
        write_atomically(folder / name, _graph(module, inputs, outputs, dynamic, folder, stored))
    files = [path.name for path in sorted(folder.iterdir()) if path.is_file()]
    manifest = {
        "format": FORMAT,
        "copedit": copedit_rt.__version__,
        "opset": OPSET,
        "precision": precision,
        "sha256": {name: digest(folder / name) for name in files},
    }
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


_Graph = tuple[nn.Module, dict[str, Tensor], tuple[str, ...], dict[str, Any]]


def graphs(config: ModelConfig, tokenizer: CoPeVAE, denoiser: MDiT3D) -> dict[str, _Graph]:
    """Per file: the module, examples of its inputs by name, names of its outputs, dynamic dimensions of its inputs."""
    batch, given = torch.export.Dim("batch"), torch.export.Dim("given")
    b, k, m = 2, 3, len(config.elements)  # examples: 1 would become a constant
    z = torch.zeros(b, m, config.tokenizer.latent_channels, *config.latent)
    joint = config.task.joint
    latents = z if joint else torch.zeros(b, k, *z.shape[2:])
    both = {0: batch, 1: given}
    encoder = {"images": torch.zeros(b, k, 1, *config.image), "observed": torch.ones(b, k, dtype=torch.bool)}
    step = {
        "z": z,
        "t": torch.zeros(b, dtype=torch.int64),
        "prompts": torch.zeros(b, 3, config.tokenizer.prompt_dim),
        "observed": torch.zeros(b, m, dtype=torch.bool),
        "previous": torch.zeros_like(z),  # a tensor of its own: the exporter takes equal objects for one input
        "coefficients": torch.zeros(b, 2, 2),
    }
    if config.denoiser.prior:
        step["prior"] = torch.zeros_like(z)
    heads = ("latents", "prompts", "count", "missing", "alone")
    varying = {name: {0: batch} for name in step}
    return {
        ENCODER: (Encoder(tokenizer), encoder, heads, {"images": both, "observed": both}),
        STEP: (Step(denoiser), step, ("next", "prediction"), varying),
        DECODER: (Decoder(tokenizer, joint), {"z": latents}, ("images",), {"z": {0: batch} if joint else both}),
    }


def _graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: tuple[str, ...],
    dynamic: Mapping[str, Any],
    folder: Path,
    stored: Mapping[str, Mapping[str, tuple[str, str, int, int]]],
) -> bytes:
    """One module as a serialised ONNX model that refers to the weights in `folder`."""
    import onnx_ir
    from onnxscript.optimizer import optimize_ir
    from onnxscript.rewriter import onnx_fusions

    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dict(dynamic),
            custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _attention},
            optimize=False,
            verbose=False,
        )
        assert program is not None
        model = program.model
        # Weights must stay as they are stored: who loads the graph transposes them once.
        optimize_ir(model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
        if all(weight.dtype == torch.float32 for weight in module.parameters()):
            onnx_fusions.fuse(model)  # RMSNormalization; of a narrow x the rule gives the result a wrong type
    for name, value in model.graph.initializers.items():
        owner, _, tensor = name.partition(".")
        place = stored.get(owner, {}).get(tensor)
        data = value.const_value
        if place is None or data is None:
            continue
        file, dtype, offset, length = place
        with open(folder / file, "rb") as weights:
            weights.seek(offset)
            same = data.dtype.name == dtype and data.tobytes() == weights.read(length)
        if same:
            value.const_value = onnx_ir.ExternalTensor(
                file,
                offset,
                length,
                data.dtype,
                shape=onnx_ir.Shape(data.shape.numpy()),
                name=name,
                base_dir=str(folder),
            )
    model.producer_name, model.producer_version = "copedit", copedit_rt.__version__
    return onnx_ir.to_proto(model).SerializeToString()


_DTYPES = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16", "I64": "INT64"}


def _stored(path: Path) -> dict[str, tuple[str, str, int, int]]:
    """Per tensor of a safetensors file: the file's name, ONNX's name of its dtype, offset and length in bytes."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    places = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            places[name] = (path.name, _DTYPES[entry["dtype"]], 8 + size + start, end - start)
    return places


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """torch's scaled_dot_product_attention in ONNX, without the options that this model does not use.

    Within an element, [N, heads, T, D], one Attention. Across elements, [B, T, heads, m, D], which Attention does not
    take: m x m scores in float32.
    """
    from onnxscript import FLOAT, opset23

    op: Any = opset23  # its type variables do not fit what Cast returns
    assert attn_mask is None and not dropout_p and not is_causal and scale is None and not enable_gqa
    if len(query.shape) == 4:
        return op.Attention(query, key, value)[0]
    q, k, v = (op.Cast(x, to=FLOAT.dtype) for x in (query, key, value))
    scores = op.MatMul(op.Mul(q, query.shape[-1] ** -0.5), op.Transpose(k, perm=[0, 1, 2, 4, 3]))
    return op.CastLike(op.MatMul(op.Softmax(scores, axis=-1), v), value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that it misses and on its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
