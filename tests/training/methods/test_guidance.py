"""Guidance by a mask, by prompts, or by nothing."""

import torch

from copedit_training.methods.guidance import Guidance

OBSERVED = torch.tensor([[True, False, True], [False, True, True]])
PROMPTS = torch.randn(2, 3, 5)


def test_each_kind_reads_its_own_and_nothing_else():
    torch.manual_seed(0)
    mask, full, none = (Guidance(kind, 3, 5, 7) for kind in ("mask", "full", "none"))
    assert [sum(p.numel() for p in g.parameters()) for g in (mask, full, none)] == [3 * 7 + 7, 15 * 7 + 7, 0]
    found = mask(OBSERVED, None)
    torch.testing.assert_close(found[0], mask.layer.weight[:, 1] + mask.layer.bias)
    assert torch.equal(mask(OBSERVED, PROMPTS), found) and not torch.equal(found[0], found[1])
    said = full(OBSERVED, PROMPTS)
    silu = PROMPTS.flatten(1) * PROMPTS.flatten(1).sigmoid()
    torch.testing.assert_close(said, silu @ full.layer[1].weight.T + full.layer[1].bias)
    assert torch.equal(full(~OBSERVED, PROMPTS), said)
    assert torch.equal(none(OBSERVED, PROMPTS), torch.zeros(2, 7)) and found.shape == said.shape == (2, 7)
