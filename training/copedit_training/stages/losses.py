"""Losses of stage I (Section 3.2, equations 1 to 4) and the learning of its codebook."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from copedit_rt import checkpoint
from copedit_rt.errors import CopeditError
from copedit_rt.networks.tokenizer import CoPeVAE, PromptEncoder, float32_on_cpu, full_precision, on_cpu

COMMITMENT = 0.25
PERCEPTUAL = 0.05
ADVERSARIAL = 0.01
PRETEXT = 0.01  # lambda of equation 4
TEMPERATURE = 0.2


class EMACodebook(nn.Module):
    """Learns a tokenizer's codes as moving averages of the vectors that choose them (van den Oord et al. 2017, A.1).

    The codes start as vectors of the first batch, each with a count of one; codes whose count falls below
    `restart_below` become vectors of the current batch. (With zero counts and random codes, under 1 % get used.)
    """

    count: Tensor
    total: Tensor
    started: Tensor

    def __init__(self, codes: int, channels: int, decay: float = 0.99, restart_below: float = 1.0):
        super().__init__()
        self.decay, self.restart_below = decay, restart_below
        self.register_buffer("count", torch.ones(codes))
        self.register_buffer("total", torch.zeros(codes, channels))
        self.register_buffer("started", torch.tensor(False))

    @torch.no_grad()
    def start(self, z: Tensor, codebook: Tensor, generator: torch.Generator) -> None:
        """Take codes from z [N, d] once, before the first quantisation."""
        if not self.started:
            self.total.copy_(_pick(z, len(codebook), generator))
            codebook.copy_(self.total)
            self.started.fill_(True)

    @torch.no_grad()
    def update(self, z: Tensor, index: Tensor, codebook: Tensor, generator: torch.Generator) -> float:
        """Move codebook [K, d] towards z [N, d] by index [N]; returns the batch's perplexity (1 to K)."""
        count, total = self.assigned(z, index)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        dead = self.count < self.restart_below
        self.total[dead] = _pick(z, int(dead.sum()), generator)
        self.count[dead] = 1.0
        codebook.copy_(self.total / self.count[:, None])
        share = count / count.sum()
        return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))

    def assigned(self, z: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """How many of z [N, d] chose each code [K], and their sums [K, d]."""
        count = torch.bincount(index, minlength=len(self.count)).to(z.dtype)
        return count, torch.zeros_like(self.total).index_add_(0, index, z)


def _pick(z: Tensor, n: int, generator: torch.Generator) -> Tensor:
    # With replacement and a little noise, so that repeated background vectors do not become identical codes.
    chosen = z[torch.randint(len(z), (n,), generator=generator).to(z.device)]
    return chosen + 0.01 * z.std() * torch.randn(chosen.shape, generator=generator).to(z.device)


def pretext_losses(tokenizer: CoPeVAE, each: Tensor, observed: Tensor, position: str = "bce") -> dict[str, Tensor]:
    """Terms of equation 4 for the prompts of each element alone [B, m, 3, P]: count (cross-entropy), position (by
    `position_loss`) and contrast (InfoNCE over the batch: a subject's observed part against every
    missing part).

    observed: [K, B, m] (bool), K missing patterns of each subject; the terms are means over them. Prompts are means
    over observed elements, so a further pattern costs next to nothing.
    """

    def mean_over(part: Tensor) -> Tensor:
        weight = part.to(each.dtype) / part.sum(-1, keepdim=True)
        return torch.einsum("kbm,bmip->kbip", weight, each).flatten(0, 1)

    missing = ~observed
    with full_precision(each):
        count, which, anchor = (logits.float() for logits in tokenizer.assess(mean_over(observed)))
        other = tokenizer.assess(mean_over(missing))[2].float()
        sides = (F.normalize(side, dim=1).unflatten(0, observed.shape[:2]) for side in (anchor, other))
        similarity = torch.einsum("kae,kbe->kab", *sides) / TEMPERATURE
    own = torch.arange(each.shape[0], device=each.device).expand(observed.shape[:2])
    return {
        "count": F.cross_entropy(count, missing.sum(-1).flatten() - 1),
        "position": position_loss(which, missing.flatten(0, 1), position),
        "contrast": F.cross_entropy(similarity.flatten(0, 1), own.flatten()),
    }


def position_loss(logits: Tensor, missing: Tensor, kind: str = "bce") -> Tensor:
    """Logits [N, m] against what is missing [N, m] (bool): "bce", each element by itself, or "cross-entropy" over the
    elements (equation 2), whose target gives the missing ones equal shares."""
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, missing.float())
    return F.cross_entropy(logits, missing.float() / missing.sum(1, keepdim=True))


@torch.no_grad()
def scale_prompts(tokenizer: CoPeVAE, features: Tensor) -> None:
    """Set the prompt encoders' linear layers so that their outputs on pooled features [N, 3, b] have mean 0 and
    deviation 1 per unit (data-dependent initialisation, Mishkin & Matas 2016).

    Averages over a whole image differ little between modalities: with default weights the count loss stays at its
    starting value for hundreds of steps.
    """
    with full_precision(features):
        for encoder, x in zip(tokenizer.prompt_encoders, features.unbind(1), strict=True):
            assert isinstance(encoder, PromptEncoder)
            for layer in (encoder.mlp[0], encoder.mlp[2]):
                assert isinstance(layer, nn.Linear)
                y = layer(x)
                deviation = y.std(0)
                deviation = deviation.clamp_min(0.1 * float(deviation.mean()) + 1e-6)
                layer.weight /= deviation[:, None]
                layer.bias.sub_(y.mean(0)).div_(deviation)
                x = F.relu(layer(x))


class Adversary(nn.Module):
    """MONAI's patch discriminator (Isola et al. 2017) under its least-squares loss (Mao et al. 2017).

    Its norms are those of single volumes, so that the loss of one does not depend on the micro-batch it is in. It has
    three levels, or fewer where an axis is shorter than 24 voxels. Raises CopeditError without MONAI.
    """

    def __init__(self, shape: Sequence[int]):
        """shape: (H, W, D) of the volumes."""
        super().__init__()
        try:
            from monai.losses import PatchAdversarialLoss
            from monai.networks.nets import PatchDiscriminator
        except ImportError as error:
            raise CopeditError("adversarial_from needs MONAI: install the extra `train`, or set it to -1") from error
        levels = [n for n in (1, 2, 3) if min(shape) // 2**n > 2]
        if not levels:
            raise CopeditError(f"adversarial_from: {tuple(shape)} voxels are too few for a discriminator; set it to -1")
        self.net = PatchDiscriminator(3, 64, in_channels=1, num_layers_d=levels[-1], norm="INSTANCE")
        self.criterion = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)

    def forward(self, output: Tensor, images: Tensor) -> dict[str, Tensor]:
        """output, images: [N, 1, H, W, D] -> "adversarial", whose gradient is the output's alone, and "discriminator",
        whose gradient is the discriminator's alone. Convolutions follow autocast on GPUs, the rest is float32."""
        if on_cpu(output):
            output = output.to(images.dtype)
        with float32_on_cpu(output):
            return self._terms(output, images)

    def _terms(self, output: Tensor, images: Tensor) -> dict[str, Tensor]:
        frozen = {name: p.detach() for name, p in self.net.named_parameters()}
        fooled = functional_call(self.net, frozen, (output,))[-1].float()
        fake, real = (self.net(x)[-1].float() for x in (output.detach(), images))
        wrong = self.criterion(fake, False, True) + self.criterion(real, True, True)
        return {"adversarial": self.criterion(fooled, True, False), "discriminator": 0.5 * wrong}


class Perceptual:
    """Squared distance between the last features of MedicalNet's ResNet-10 (Chen et al. 2019), of unit length at each
    place, as in MONAI's PerceptualLoss, which can only download the network. Volumes are brought to mean 0 and
    deviation 1, as it was trained, each by itself. Frozen."""

    def __init__(self, weights: Path, device: torch.device):
        """weights: the network's state as safetensors, with or without "module." in front of the names.

        Raises CopeditError for a file that is missing or not that, and without MONAI.
        """
        try:
            from monai.networks.nets import ResNetFeatures
        except ImportError as error:
            raise CopeditError("perceptual needs MONAI: install the extra `train`, or leave it empty") from error
        if not weights.is_file():
            raise CopeditError(f"perceptual = {str(weights)!r}: no such file; name the weights, or leave it empty")
        net = ResNetFeatures("resnet10", pretrained=False)
        given = {name.removeprefix("module."): x for name, x in checkpoint.read_tensors(weights)[0].items()}
        counters = {name: x for name, x in net.state_dict().items() if name.endswith("num_batches_tracked")}
        known = {name: tensor for name, tensor in given.items() if name in net.state_dict()}
        checkpoint.fill(net, counters | known, weights, owner="MedicalNet's ResNet-10")
        self.net = net.to(device).eval().requires_grad_(False)

    def __call__(self, output: Tensor, images: Tensor) -> Tensor:
        """output, images: [N, 1, H, W, D]; the mean over volumes and places, float32."""
        with float32_on_cpu(output):
            a, b = (F.normalize(self.net(F.instance_norm(x.float()))[-1].float(), dim=1) for x in (output, images))
        return (a - b).square().sum(1).mean()


def weigh(terms: dict[str, Tensor], pretext: float, tasks: Sequence[float] = (1.0, 0.5, 0.5)) -> Tensor:
    """Total of stage I of the terms that there are; `pretext` is the weight of the pretext tasks, `tasks` those of
    count, position and contrast among each other.

    The discriminator's own term counts in full: it and the rest share no weights.
    """
    total = torch.zeros(())
    if "l1" in terms:
        total = terms["l1"]
    if "commitment" in terms:
        total = total + COMMITMENT * terms["commitment"]
    if "perceptual" in terms:
        total = total + PERCEPTUAL * terms["perceptual"]
    if "adversarial" in terms:
        total = total + ADVERSARIAL * terms["adversarial"] + terms["discriminator"]
    if "count" in terms:
        count, position, contrast = tasks
        inner = count * terms["count"] + position * terms["position"] + contrast * terms["contrast"]
        total = total + pretext * inner
    return total
