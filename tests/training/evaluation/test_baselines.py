import numpy as np

from copedit_training.evaluation import baselines


def test_regression_recovers_a_linear_relation():
    rng = np.random.default_rng(0)
    studies = []
    for _ in range(3):
        x, y = rng.random((2, 8, 8, 8))
        x[:2], y[:2] = 0, 0
        z = np.where((x > 0) | (y > 0), 0.1 + 0.5 * x + 0.2 * y, 0)
        studies.append({"a": x, "b": y, "c": z})
    model = baselines.LinearRegression(("a", "b", "c"))
    model.fit(iter(studies))
    for target, given in (("c", ("b", "a")), ("a", ("c", "b"))):
        observed = {name: studies[0][name] for name in given}
        assert np.allclose(model.predict(observed, target), studies[0][target], atol=1e-5)
    assert (model.predict({"a": studies[0]["a"]}, "c")[:2] == 0).all()  # background stays background


def test_slice_baselines():
    stack = np.broadcast_to(np.arange(6.0), (3, 3, 6)).copy()
    holes = stack.copy()
    holes[..., [0, 2, 3]] = -9
    assert np.allclose(baselines.interpolate_slices(holes, [0, 2, 3])[0, 0], [1, 1, 2, 3, 4, 5])
    assert baselines.nearest_slices(holes, [0, 2, 3])[0, 0].tolist() == [1, 1, 1, 4, 4, 5]
