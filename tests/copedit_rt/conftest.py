"""Small models that were exported once for all tests of a process; they must not be changed."""

from pathlib import Path

import pytest
from small import BRAIN, HEART, exported


@pytest.fixture(scope="session")
def brain(tmp_path_factory) -> Path:
    return exported(BRAIN, tmp_path_factory.mktemp("brain"))


@pytest.fixture(scope="session")
def heart(tmp_path_factory) -> Path:
    return exported(HEART, tmp_path_factory.mktemp("heart"))


@pytest.fixture(params=["brain", "heart"])
def either(request) -> Path:
    return request.getfixturevalue(request.param)
