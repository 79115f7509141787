"""The tests' own tools: the tolerance rule and the layouts."""

import math

import pytest
import torch
from checks import Layout, assert_rule, layouts, normal, place, poisoned_memory
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_rule_takes_a_rounding_and_twice_the_reference_error(dtype: torch.dtype) -> None:
    exact = normal(40, 30)
    low = exact.to(dtype)
    assert_rule(low, low, exact)
    noise = 0.01 * normal(40, 30, seed=1)
    assert_rule((exact + 1.9 * noise).to(dtype), (exact + noise).to(dtype), exact)
    for factor in (3, -3):
        with pytest.raises(AssertionError, match="error"):
            assert_rule((exact + factor * noise).to(dtype), (exact + noise).to(dtype), exact)


def test_the_rule_refuses() -> None:
    exact = normal(40, 30)
    low = exact.float()
    for change in (math.nan, math.inf, 1e-5):
        wrong = low.clone()
        wrong[3, 4] += change
        with pytest.raises(AssertionError, match="error"):
            assert_rule(wrong, low, exact)
    # Small everywhere, so only the mean square shows it.
    with pytest.raises(AssertionError, match="mean square"):
        assert_rule(low + 1.9e-7, low, exact)
    with pytest.raises(AssertionError, match="float16"):
        assert_rule(low.half(), low, exact)
    with pytest.raises(AssertionError):
        assert_rule(low[:1], low[:1], exact)
    with pytest.raises(AssertionError, match="error"):
        assert_rule(exact.float().double(), exact, exact)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_a_placed_tensor_keeps_its_values_and_touches_no_poison(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    n = len(shape)
    layout = data.draw(layouts(n, data.draw(st.integers(0, 1)), tuple(range(n - 1))))
    x = normal(*shape)
    view = place(x, layout)
    for d in layout.expanded:
        x = x.narrow(d, 0, 1).expand_as(x)
    assert torch.equal(view, x)
    assert all(view.stride(d) == 0 for d in layout.expanded if view.shape[d] > 1)
    buffer = torch.empty(0, dtype=view.dtype).set_(view.untyped_storage())
    kept = view[tuple(slice(1) if d in layout.expanded else slice(None) for d in range(n))].numel()
    assert (~buffer.isnan()).sum() == kept or layout.expanded
    inner = place(x, Layout.inside(n))
    assert inner.stride(-1) == 1 and inner.untyped_storage().nbytes() > inner.nbytes


def test_uninitialised_memory_is_poisoned() -> None:
    with poisoned_memory():
        for x in (torch.empty(3), torch.empty_like(torch.zeros(3)), torch.zeros(1).new_empty(3)):
            assert x.isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
