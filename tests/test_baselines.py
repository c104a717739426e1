"""The closed-form baseline, against scikit-learn and plain NumPy."""

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sb3_reinforce.baselines import LinearBaseline, QuadraticFeatures, RandomFeatures

shapes = st.tuples(st.integers(1, 60), st.integers(1, 12))
seeds = st.integers(0, 2**32 - 1)


def samples(shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=shape) * 10 ** rng.uniform(-1, 1, size=shape[1]) + rng.normal(size=shape[1])
    return features, 100 * rng.normal(size=shape[0]) + features.sum(axis=1)


def predict(baseline: LinearBaseline, features: np.ndarray) -> np.ndarray:
    return baseline(th.as_tensor(features)).numpy().flatten()


def weights(baseline: LinearBaseline) -> np.ndarray:
    return np.append(baseline.weight.numpy(), baseline.bias.numpy())


@given(shapes, seeds)
def test_equals_linear_regression(shape: tuple[int, int], seed: int):
    features, returns = samples(shape, seed)
    baseline = LinearBaseline(shape[1])
    baseline.fit(features, returns)
    expected = LinearRegression().fit(features, returns)
    np.testing.assert_allclose(predict(baseline, features), expected.predict(features), rtol=1e-5, atol=1e-3)
    if shape[0] > 2 * shape[1]:
        np.testing.assert_allclose(weights(baseline), [*expected.coef_, expected.intercept_], rtol=1e-5, atol=1e-4)


@given(shapes, seeds, st.sampled_from([1e-5, 1e-3, 1.0]))
def test_ridge_equals_ridge_on_standardised_features(shape: tuple[int, int], seed: int, ridge: float):
    features, returns = samples(shape, seed)
    baseline = LinearBaseline(shape[1], ridge=ridge)
    baseline.fit(features, returns)
    expected = make_pipeline(StandardScaler(), Ridge(alpha=ridge * shape[0], solver="svd")).fit(features, returns)
    elsewhere, _ = samples(shape, seed + 1)
    np.testing.assert_allclose(predict(baseline, features), expected.predict(features), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(predict(baseline, elsewhere), expected.predict(elsewhere), rtol=1e-4, atol=1e-2)


@given(seeds, st.sampled_from([0.0, 1e-3]))
def test_wide_and_tall_solutions_are_the_same(seed: int, ridge: float):
    """The two ways to solve it meet where there are as many features as samples."""
    features, returns = samples((10, 10), seed)
    tall, wide = LinearBaseline(10, ridge), LinearBaseline(11, ridge)
    tall.fit(features, returns)
    wide.fit(np.column_stack([features, np.full(10, 7.0)]), returns)
    np.testing.assert_allclose(weights(wide)[:10], weights(tall)[:10], rtol=1e-4, atol=1e-6)
    assert weights(wide)[10] == 0


@given(seeds, st.integers(2, 40))
def test_collinear_features_share_the_smallest_weights(seed: int, n_samples: int):
    rng = np.random.default_rng(seed)
    feature, returns = rng.normal(size=n_samples), rng.normal(size=n_samples)
    single, double = LinearBaseline(1), LinearBaseline(2)
    single.fit(feature[:, None], returns)
    double.fit(np.column_stack([feature, feature]), returns)
    np.testing.assert_allclose(double.weight.numpy()[0], np.full(2, single.weight.item() / 2), rtol=1e-6)
    np.testing.assert_allclose(predict(double, np.ones((1, 2))), predict(single, np.ones((1, 1))), rtol=1e-6)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e6])
@pytest.mark.parametrize("n_samples", [2, 50])
def test_constant_features_get_no_weight(constant: float, n_samples: int):
    rng = np.random.default_rng(0)
    features = np.column_stack([rng.normal(size=n_samples), np.full(n_samples, constant, dtype=np.float32)])
    baseline = LinearBaseline(2)
    baseline.fit(features, rng.normal(size=n_samples))
    assert baseline.weight[0, 1] == 0
    assert np.isfinite(weights(baseline)).all()


def test_badly_scaled_features_are_fitted_all_the_same():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 3)) * [1e-9, 1.0, 1e9] + [0, 0, 3e9]
    baseline = LinearBaseline(3)
    baseline.fit(features, features @ [2e9, -3.0, 1e-9] + 5)
    np.testing.assert_allclose(baseline.weight.numpy()[0], [2e9, -3.0, 1e-9], rtol=1e-6)


@pytest.mark.parametrize("n_features", [1, 5])
def test_a_single_sample_is_predicted_everywhere(n_features: int):
    baseline = LinearBaseline(n_features)
    baseline.fit(np.arange(n_features, dtype=np.float32)[None], np.array([42.0]))
    np.testing.assert_allclose(predict(baseline, np.ones((3, n_features))), 42.0)


def test_is_zero_before_the_first_fit():
    assert not weights(LinearBaseline(3)).any()


@given(seeds, st.sampled_from([0.1, 0.7, 0.95]))
def test_memory_is_weighted_least_squares_over_all_batches(seed: int, memory: float):
    rng = np.random.default_rng(seed)
    batches = [(rng.normal(size=(n, 3)) + n, rng.normal(size=n) + rng.normal()) for n in (4, 30, 11)]
    baseline = LinearBaseline(3, memory=memory)
    for features, returns in batches:
        baseline.fit(features, returns)
    sample_weight = np.concatenate([np.full(len(r), memory ** (2 - i)) for i, (_, r) in enumerate(batches)])
    expected = LinearRegression().fit(
        np.concatenate([features for features, _ in batches]),
        np.concatenate([returns for _, returns in batches]),
        sample_weight,
    )
    np.testing.assert_allclose(weights(baseline), [*expected.coef_, expected.intercept_], rtol=1e-6, atol=1e-8)


def test_memory_is_part_of_the_state():
    rng = np.random.default_rng(0)
    baseline, twin = LinearBaseline(3, memory=0.5), LinearBaseline(3, memory=0.5)
    baseline.fit(rng.normal(size=(9, 3)), rng.normal(size=9))
    twin.load_state_dict(baseline.state_dict())
    batch = rng.normal(size=(9, 3)), rng.normal(size=9)
    baseline.fit(*batch)
    twin.fit(*batch)
    np.testing.assert_array_equal(weights(twin), weights(baseline))


@pytest.mark.parametrize("memory", [0.0, 0.5])
@pytest.mark.parametrize(
    ("features", "returns"),
    [
        (np.zeros((0, 2)), np.zeros(0)),
        (np.ones((3, 4)), np.zeros(3)),
        (np.array([[1.0, np.nan], [1.0, 2.0]]), np.zeros(2)),
        (np.ones((2, 2)), np.array([1.0, np.inf])),
    ],
)
def test_bad_samples_are_refused_and_change_nothing(features: np.ndarray, returns: np.ndarray, memory: float):
    rng = np.random.default_rng(0)
    baseline = LinearBaseline(2, memory=memory)
    baseline.fit(rng.normal(size=(9, 2)), rng.normal(size=9))
    before = {name: value.clone() for name, value in baseline.state_dict().items()}
    with pytest.raises(ValueError, match="baseline"):
        baseline.fit(features, returns)
    for name, value in baseline.state_dict().items():
        assert th.equal(value, before[name])


def test_nothing_is_a_parameter():
    for module in (LinearBaseline(3, memory=0.5), QuadraticFeatures(3), RandomFeatures(3)):
        assert not list(module.parameters())


def test_quadratic_features():
    features = th.tensor([[1.0, -2.0], [0.5, 3.0]])
    expected = th.tensor([[1.0, -2.0, 1.0, 4.0], [0.5, 3.0, 0.25, 9.0]])
    assert th.equal(QuadraticFeatures(2)(features), expected)
    assert QuadraticFeatures(2).out_features == 4


def test_random_features_are_fixed_and_follow_the_seed():
    features = th.randn(5, 3)
    th.manual_seed(1)
    first = RandomFeatures(3, n_random=16)
    th.manual_seed(1)
    same = RandomFeatures(3, n_random=16)
    other = RandomFeatures(3, n_random=16)
    assert th.equal(first(features), same(features))
    assert not th.equal(first(features), other(features))
    assert first(features).shape == (5, first.out_features) == (5, 19)
    assert th.equal(first(features)[:, :3], features)
    expected = np.tanh(features.numpy() @ first.weight.numpy().T + first.bias.numpy())
    np.testing.assert_allclose(first(features)[:, 3:].numpy(), expected, atol=1e-6)
    other.load_state_dict(first.state_dict())
    assert th.equal(first(features), other(features))


def test_richer_maps_explain_what_a_line_cannot():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(2000, 2)).astype(np.float32)
    returns = states[:, 0] ** 2 + np.sin(2 * states[:, 1])
    unexplained = {}
    th.manual_seed(0)
    for name, feature_map in (("linear", None), ("quadratic", QuadraticFeatures(2)), ("random", RandomFeatures(2))):
        features = states if feature_map is None else feature_map(th.as_tensor(states)).numpy()
        baseline = LinearBaseline(features.shape[1], ridge=1e-5)
        baseline.fit(features, returns)
        unexplained[name] = np.var(returns - predict(baseline, features)) / np.var(returns)
    assert unexplained["random"] < 0.05 < unexplained["quadratic"] < 0.5 < unexplained["linear"]


def test_truncated_predictions_stay_within_the_returns_of_the_latest_batch():
    """A feature that hardly varies is weighted heavily, and may vary more the next time."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 2)) * [1, 1e-6]
    returns = features @ [1, 1e6] + 3
    probe = th.as_tensor(np.vstack([features, [[0, 1], [0, -1]]]))
    free, truncated = LinearBaseline(2), LinearBaseline(2, truncate=True)
    assert not truncated(probe).any()
    for baseline in (free, truncated):
        baseline.fit(features, returns)
    predictions = truncated(probe).numpy().flatten()
    np.testing.assert_allclose(predictions[:-2], returns)
    assert list(predictions[-2:]) == [returns.max(), returns.min()]
    assert free(probe).abs().max() > 1e5
