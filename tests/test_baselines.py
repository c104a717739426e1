"""The closed-form baseline, against scikit-learn and plain NumPy."""

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sb3_reinforce.baselines import (
    MAX_FEATURES,
    LinearBaseline,
    NoBaseline,
    QuadraticFeatures,
    RandomFeatures,
    RandomProjection,
)

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
def test_ridge_equals_ridge_on_standardized_features(shape: tuple[int, int], seed: int, ridge: float):
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


@given(seeds, st.floats(0.05, 0.95), st.integers(1, 6), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.booleans())
def test_memory_is_weighted_least_squares_over_all_batches(
    seed: int, memory: float, n_features: int, sizes: list[int], with_ridge: bool
):
    rng = np.random.default_rng(seed)
    sizes = [*sizes, 3 * n_features + 3]
    batches = [(rng.normal(size=(n, n_features)) + rng.normal(), rng.normal(size=n) + rng.normal()) for n in sizes]
    ridge = 0.1 if with_ridge else 0.0
    baseline = LinearBaseline(n_features, ridge, memory)
    for features, returns in batches:
        baseline.fit(features, returns)
    sample_weight = np.concatenate([np.full(n, memory ** (len(sizes) - 1 - i)) for i, n in enumerate(sizes)])
    features, returns = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    if with_ridge:
        # In units of the weighted standard deviation
        mean = np.average(features, axis=0, weights=sample_weight)
        std = np.sqrt(np.average((features - mean) ** 2, axis=0, weights=sample_weight))
        expected = Ridge(alpha=ridge * sample_weight.sum(), solver="svd").fit(features / std, returns, sample_weight)
        expected.coef_ = expected.coef_ / std
    else:
        expected = LinearRegression().fit(features, returns, sample_weight)
    np.testing.assert_allclose(weights(baseline), [*expected.coef_, expected.intercept_], rtol=1e-5, atol=1e-7)


def test_memory_takes_half_of_the_scatter_matrix():
    n_numbers = sum(value.numel() for value in LinearBaseline(100, memory=0.5).state_dict().values())
    assert n_numbers < 101 * 102 / 2 + 4 * 101


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
    wide = LinearBaseline(MAX_FEATURES + 1, memory=0.5, truncate=True)
    for module in (wide, QuadraticFeatures(3), RandomFeatures(3), RandomProjection(3, 2), NoBaseline()):
        assert not list(module.parameters())


def test_no_baseline_expects_nothing_and_has_no_state():
    baseline = NoBaseline()
    features = th.ones(3, 2)
    baseline.fit(baseline.project(features).numpy(), np.ones(3))
    assert th.equal(baseline(features), th.zeros(3, 1, dtype=th.float64))
    assert not baseline.state_dict()


def test_quadratic_features():
    features = th.tensor([[1.0, -2.0], [0.5, 3.0]])
    expected = th.tensor([[1.0, -2.0, 1.0, 4.0], [0.5, 3.0, 0.25, 9.0]])
    assert th.equal(QuadraticFeatures(2)(features), expected)
    assert QuadraticFeatures(2).out_features == 4


def test_random_features_are_fixed_and_follow_the_seed():
    features = th.randn(5, 3)
    th.manual_seed(1)
    first = RandomFeatures(3, n_units=16)
    th.manual_seed(1)
    same = RandomFeatures(3, n_units=16)
    other = RandomFeatures(3, n_units=16)
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
    for name, feature_map in (("linear", None), ("quadratic", QuadraticFeatures(2)), ("random_features", RandomFeatures(2))):
        features = states if feature_map is None else feature_map(th.as_tensor(states)).numpy()
        baseline = LinearBaseline(features.shape[1], ridge=1e-5)
        baseline.fit(features, returns)
        unexplained[name] = np.var(returns - predict(baseline, features)) / np.var(returns)
    assert unexplained["random_features"] < 0.05 < unexplained["quadratic"] < 0.5 < unexplained["linear"]


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


# Wide features ---------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 8), seeds)
def test_a_random_projection_sends_every_feature_to_one_output_with_a_sign(n: int, n_out: int, seed: int):
    th.manual_seed(seed)
    projection = RandomProjection(n, n_out)
    matrix = projection(th.eye(n, dtype=th.float64)).numpy()
    assert matrix.shape == (n, n_out)
    assert ((matrix != 0).sum(axis=1) == 1).all() and (np.abs(matrix).sum(axis=1) == 1).all()
    features = np.random.default_rng(seed).normal(size=(4, n))
    np.testing.assert_allclose(projection(th.as_tensor(features)).numpy(), features @ matrix, atol=1e-12)
    twin = RandomProjection(n, n_out)
    twin.load_state_dict(projection.state_dict())
    np.testing.assert_array_equal(twin(th.eye(n)).numpy(), matrix)


def test_random_projections_keep_scalar_products_on_average():
    """Statistical, with a fixed seed: five standard errors, over many projections."""
    th.manual_seed(0)
    n, n_out, n_projections = 60, 20, 4000
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=n) + 1, rng.normal(size=n) + 1
    pair = th.as_tensor(np.stack([one, other]))
    products = np.empty((n_projections, 2))
    for index in range(n_projections):
        a, b = RandomProjection(n, n_out)(pair).numpy()
        products[index] = a @ b, a @ a
    standard_errors = products.std(axis=0) / np.sqrt(n_projections)
    assert np.all(np.abs(products.mean(axis=0) - [one @ other, one @ one]) < 5 * standard_errors)
    # As far from it as the count sketch should be: pairs of features that share an output
    variance = ((one @ one) * (other @ other) + (one @ other) ** 2 - 2 * np.sum((one * other) ** 2)) / n_out
    assert products[:, 0].var() == pytest.approx(variance, rel=0.1)


@settings(max_examples=10)
@given(st.integers(MAX_FEATURES + 1, 1500), seeds, st.sampled_from([0.0, 0.5]))
def test_wide_features_are_fitted_through_random_projections(n_features: int, seed: int, memory: float):
    rng = np.random.default_rng(seed)
    th.manual_seed(seed)
    baseline = LinearBaseline(n_features, ridge=1e-3, memory=memory)
    features, returns = rng.normal(size=(50, n_features)), rng.normal(size=50)
    projections = baseline.project(th.as_tensor(features))
    assert projections.shape == (50, MAX_FEATURES)
    baseline.fit(projections.numpy(), returns)
    expected = make_pipeline(StandardScaler(), Ridge(alpha=1e-3 * 50, solver="svd")).fit(projections.numpy(), returns)
    probe = th.as_tensor(rng.normal(size=(5, n_features)))
    values = baseline(probe).numpy().flatten()
    np.testing.assert_allclose(values, expected.predict(baseline.project(probe).numpy()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_features", [1, MAX_FEATURES])
def test_features_that_are_few_enough_are_left_as_they_are(n_features: int):
    features = th.randn(2, n_features)
    assert LinearBaseline(n_features).project(features) is features


def test_projected_features_explain_their_share_of_returns_that_are_linear_in_all_features():
    """Every feature counts alike: as much is lost as there are fewer directions."""
    th.manual_seed(0)
    rng = np.random.default_rng(0)
    n_features = 600
    features = rng.normal(size=(4000, n_features))
    returns = features @ rng.normal(size=n_features)
    baseline = LinearBaseline(n_features, ridge=1e-3)
    baseline.fit(baseline.project(th.as_tensor(features)).numpy(), returns)
    probe = rng.normal(size=(1000, n_features))
    assert np.isfinite(predict(baseline, probe)).all()
    unexplained = np.var(returns - predict(baseline, features)) / np.var(returns)
    # Of 600 directions, 384 random ones are kept but for those outputs that no feature goes to
    assert 1 - MAX_FEATURES / n_features < unexplained < 0.7
