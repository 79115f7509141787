"""Losses of stage I (Section 3.2, equations 1 to 4) and the learning of its codebook."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copedit_rt.tokenizer import CoPeVAE, PromptEncoder, full_precision

COMMITMENT = 0.25
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
        count = torch.bincount(index, minlength=len(codebook)).to(z.dtype)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(torch.zeros_like(self.total).index_add_(0, index, z), 1 - self.decay)
        dead = self.count < self.restart_below
        self.total[dead] = _pick(z, int(dead.sum()), generator)
        self.count[dead] = 1.0
        codebook.copy_(self.total / self.count[:, None])
        share = count / count.sum()
        return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))


def _pick(z: Tensor, n: int, generator: torch.Generator) -> Tensor:
    # With replacement and a little noise, so that repeated background vectors do not become identical codes.
    chosen = z[torch.randint(len(z), (n,), generator=generator).to(z.device)]
    return chosen + 0.01 * z.std() * torch.randn(chosen.shape, generator=generator).to(z.device)


def pretext_losses(tokenizer: CoPeVAE, each: Tensor, observed: Tensor) -> dict[str, Tensor]:
    """Terms of equation 4 for the prompts of each element alone [B, m, 3, P]: count (cross-entropy), position
    (multi-label binary cross-entropy) and contrast (InfoNCE over the batch: a subject's observed part against every
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
        "position": F.binary_cross_entropy_with_logits(which, missing.flatten(0, 1).float()),
        "contrast": F.cross_entropy(similarity.flatten(0, 1), own.flatten()),
    }


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


def weigh(terms: dict[str, Tensor], pretext: float) -> Tensor:
    """Total of stage I of the terms that there are; `pretext` is the weight of the pretext tasks.

    The perceptual and adversarial terms need weights and a discriminator and are not here yet.
    """
    total = torch.zeros(())
    if "l1" in terms:
        total = terms["l1"]
    if "commitment" in terms:
        total = total + COMMITMENT * terms["commitment"]
    if "count" in terms:
        total = total + pretext * (terms["count"] + 0.5 * terms["position"] + 0.5 * terms["contrast"])
    return total
