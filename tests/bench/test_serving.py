"""A real server under load, with tiny models."""

import pytest
from small import BRAIN, HEART, saved

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("multipart", reason="needs the extra serve")
pytest.importorskip("prometheus_client", reason="needs the extra serve")

from copedit_bench import serving


@pytest.mark.slow
def test_five_hundred_requests(tmp_path):
    """All answered, equal to the command's, memory flat: what each request leaves would show after hundreds."""
    models = [str(saved(config, tmp_path / config.task)) for config in (BRAIN, HEART)]
    report = serving.run(models, alone=20)
    assert sum(report["statuses"].values()) == 500 and report["statuses"]["200"] == 400
    half = len(report["memory"]["samples"]) // 2
    first, second = report["memory"]["samples"][:half], report["memory"]["samples"][half:]
    assert max(second) < 1.1 * max(first) + 2**25
    assert "400 of 200" in serving.markdown(report)
