"""Brain or heart: a task is its name, and says what differs."""

import json

import numpy as np
import pytest

from copedit_rt.config import PRESETS, ModelConfig
from copedit_rt.errors import CopeditError
from copedit_rt.images.find import find_studies
from copedit_rt.images.study import Study
from copedit_rt.task import Task


def test_a_task_is_its_name():
    assert Task.HEART == "cardiac" and f"{Task.BRAIN}" == "brain" and Study("x", "cardiac", {}).task is Task.HEART
    config = PRESETS["cardiac"]
    there_and_back = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert there_and_back == config and there_and_back.task is Task.HEART
    with pytest.raises(CopeditError, match="'knee' is not a valid"):
        ModelConfig.from_dict(config.to_dict() | {"task": "knee"})
    for wrong in (lambda: Study("x", "knee", {}), lambda: find_studies(".", task="knee")):
        with pytest.raises(CopeditError, match="task 'knee' is unknown; it must be brain or cardiac"):
            wrong()


def test_what_is_decoded_and_what_can_be_missing():
    observed, elements = np.array([True, False, True]), ("a", "b", "c")
    assert Task.BRAIN.decoded(observed).tolist() == [False, True, False] and Task.HEART.decoded(observed).all()
    assert Task.BRAIN.patterns(elements, 2) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert Task.HEART.patterns(elements, 2) == [("a", "b"), ("b", "c")]
    assert (Task.BRAIN.volumes(elements), Task.HEART.volumes(elements)) == (elements, ("sax",))
