"""What the tests of the benchmarks share."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """Benchmarks collect garbage before they time, which would look through all that earlier tests have left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
