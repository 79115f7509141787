"""What the tests of the benchmarks share."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """Benchmarks collect garbage before they time, and look through all that earlier tests have left: 0.3 s a time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
