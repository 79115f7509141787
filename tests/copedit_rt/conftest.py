"""Small models for all tests of a process; they must not be changed."""

from dataclasses import replace
from pathlib import Path

import pytest
from small import BRAIN, HEART, exported, saved

from copedit_rt.config import DiffusionConfig


@pytest.fixture(scope="session")
def brain(tmp_path_factory) -> Path:
    """Exported."""
    return exported(BRAIN, tmp_path_factory.mktemp("brain"))


@pytest.fixture(scope="session")
def heart(tmp_path_factory) -> Path:
    """Exported."""
    return exported(HEART, tmp_path_factory.mktemp("heart"))


@pytest.fixture(params=["brain", "heart"])
def either(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def brain_model(tmp_path_factory) -> Path:
    """For torch alone, with two steps."""
    return saved(replace(BRAIN, diffusion=DiffusionConfig(steps=2)), tmp_path_factory.mktemp("models") / "brain")


@pytest.fixture(scope="session")
def heart_model(tmp_path_factory) -> Path:
    """For torch alone, with two steps."""
    return saved(replace(HEART, diffusion=DiffusionConfig(steps=2)), tmp_path_factory.mktemp("models") / "heart")
