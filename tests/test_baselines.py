"""The closed-form critics of states and of actions, against scikit-learn and plain NumPy."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sb3_reinforce import baselines
from sb3_reinforce.baselines import (
    MAX_FEATURES,
    ActionFeatures,
    ActionValues,
    LinearBaseline,
    NoBaseline,
    QuadraticFeatures,
    RandomFeatures,
    RandomProjection,
)

BOX = spaces.Box(-1, 1, (2,))
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
    of_actions = ActionFeatures(3, BOX), ActionValues(MAX_FEATURES, BOX, memory=0.5, truncate=True)
    for module in (wide, QuadraticFeatures(3), RandomFeatures(3), RandomProjection(3, 2), NoBaseline(), *of_actions):
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


# Features of actions ---------------------------------------------------------------------------------------------------------


def encoded(action: Any, space: spaces.Space, squashed: bool = False) -> list[float]:
    """The numbers that stand for one action, in plain Python."""
    if isinstance(space, spaces.Discrete):
        return [float(action == choice) for choice in range(int(space.n))]
    if isinstance(space, spaces.MultiDiscrete):
        return [float(one == choice) for one, n in zip(action, space.nvec, strict=True) for choice in range(n)]
    if isinstance(space, spaces.MultiBinary):
        return [float(bit) for bit in action]
    assert isinstance(space, spaces.Box)
    numbers = []
    for number, low, high in zip(np.ravel(action).tolist(), *bounds(space, squashed), strict=True):
        number = min(max(number, low), high)
        if -np.inf < low < high < np.inf:
            number = (number - (low + high) / 2) / ((high - low) / 2)
        numbers.append(number)
    return [*numbers, *(number**2 for number in numbers)]


def bounds(space: spaces.Box, squashed: bool = False) -> tuple[list[float], list[float]]:
    low, high = space.low.ravel().tolist(), space.high.ravel().tolist()
    return ([-1.0] * len(low), [1.0] * len(high)) if squashed else (low, high)


def joint_features(states: np.ndarray, actions: Any, space: spaces.Space, squashed: bool = False) -> np.ndarray:
    """States, actions, and the product of every number of the one with every number of the other, in plain Python."""
    rows = []
    for state, action in zip(states.tolist(), actions, strict=True):
        numbers = encoded(action, space, squashed)
        rows.append([*state, *numbers, *(one * other for one in state for other in numbers)])
    return np.array(rows)


#: Bounds of one dimension of a Box. The widest that float32 has span more than float32 has
BOUNDS = [(-1, 1), (-2, 0.5), (0, 10), (3, 3), (-3e38, 3e38), (-np.inf, np.inf), (0, np.inf), (-np.inf, -2)]


@st.composite
def boxes(draw: st.DrawFn) -> spaces.Box:
    shape = draw(st.sampled_from([(), (1,), (2,), (2, 3)]))
    chosen = draw(st.lists(st.sampled_from(BOUNDS), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    low, high = (np.reshape(np.array(side, np.float32), shape) for side in zip(*chosen, strict=True))
    return spaces.Box(low, high, shape)


discrete_spaces: Any = st.one_of(
    st.builds(spaces.Discrete, st.integers(1, 5)),
    st.builds(spaces.MultiDiscrete, st.lists(st.integers(1, 4), min_size=1, max_size=3)),
    st.builds(spaces.MultiBinary, st.integers(1, 4)),
)


def as_sampled(actions: np.ndarray) -> th.Tensor:
    """(n, action_dim) as the rollout buffer has them."""
    return th.as_tensor(actions.reshape(len(actions), -1))


def box_actions(space: spaces.Box, n: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian samples, of which some are beyond the bounds, and some far beyond."""
    low, high = bounds(space)
    columns = []
    for one, other in zip(low, high, strict=True):
        is_bounded = np.isfinite([one, other]).all()
        center, width = ((one + other) / 2, max(other - one, 1)) if is_bounded else (0, 10)
        columns.append(center + width * rng.choice([0.2, 1, 10], size=n) * rng.normal(size=n))
    return np.clip(np.transpose(columns), -3.4e38, 3.4e38).astype(np.float32).reshape(n, *space.shape)


@given(boxes(), st.integers(0, 4), st.integers(1, 6), st.booleans(), seeds)
def test_features_of_continuous_actions_follow_the_definition(
    space: spaces.Box, n_states: int, n: int, squashed: bool, seed: int
):
    """Clipped to the bounds, scaled where both are finite, and squared; beside the state, and times the state."""
    rng = np.random.default_rng(seed)
    states, actions = rng.normal(size=(n, n_states)).astype(np.float32), box_actions(space, n, rng)
    module = ActionFeatures(n_states, space, squashed)
    found = module(th.as_tensor(states), as_sampled(actions))
    assert found.dtype == th.float32 and found.shape == (n, module.out_features)
    np.testing.assert_allclose(found.numpy(), joint_features(states, actions, space, squashed), rtol=1e-5, atol=1e-6)


@given(discrete_spaces, st.integers(0, 4), st.integers(1, 6), seeds)
def test_features_of_discrete_actions_follow_the_definition(space: spaces.Space, n_states: int, n: int, seed: int):
    """One-hot vectors, several of them side by side; bits as they are."""
    rng = np.random.default_rng(seed)
    space.seed(seed)
    states, actions = rng.normal(size=(n, n_states)).astype(np.float32), np.array([space.sample() for _ in range(n)])
    module = ActionFeatures(n_states, space)
    found = module(th.as_tensor(states), as_sampled(actions))
    assert found.dtype == th.float32 and found.shape == (n, module.out_features)
    np.testing.assert_array_equal(found.numpy(), joint_features(states, actions, space).astype(np.float32))


@pytest.mark.parametrize(
    ("low", "high", "action", "expected"),
    [
        (-2, 2, 1.0, 0.5),
        (-2, 2, 7.0, 1.0),
        (0, 10, 2.5, -0.5),
        (0, 10, -4.0, -1.0),
        (3, 3, 8.0, 3.0),
        (0, np.inf, -5.0, 0.0),
        (0, np.inf, 5.0, 5.0),
        (-np.inf, 2, 5.0, 2.0),
        (-np.inf, np.inf, -5.0, -5.0),
        (-3e38, 3e38, 1.5e38, 0.5),
        (-3e38, 3e38, 3.4e38, 1.0),
    ],
)
def test_an_action_is_what_the_environment_gets_of_it_on_the_scale_of_the_bounds(
    low: float, high: float, action: float, expected: float
):
    numbers = ActionFeatures(0, spaces.Box(low, high, (1,))).encode(th.tensor([[action]]))
    th.testing.assert_close(numbers, th.tensor([[expected, expected**2]]))


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint8])
def test_bounds_may_be_of_any_type(dtype: Any):
    space = spaces.Box(0, 200, (1,), dtype)
    numbers = ActionFeatures(0, space).encode(th.tensor([[50.0], [100.0], [201.0]]))
    th.testing.assert_close(numbers, th.tensor([[-0.5, 0.25], [0.0, 0.0], [1.0, 1.0]]))


def test_a_policy_that_squashes_has_actions_between_minus_1_and_1_whatever_the_bounds():
    space, actions = spaces.Box(-5, 50, (2,)), th.tensor([[-0.5, 0.25]])
    squashed, plain = ActionFeatures(0, space, squashed=True), ActionFeatures(0, space)
    th.testing.assert_close(squashed.encode(actions), th.tensor([[-0.5, 0.25, 0.25, 0.0625]]))
    assert not th.allclose(plain.encode(actions), squashed.encode(actions))


# Critics of action values ----------------------------------------------------------------------------------------------------

ACTION_SPACES: Any = st.sampled_from(
    [
        spaces.Discrete(3),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(2),
        spaces.Box(-2, 1, (2,)),
        spaces.Box(-1, 1, (1, 2)),
        spaces.Box(-np.inf, np.inf, (1,)),
        spaces.Box(np.array([0, -1], np.float32), np.array([np.inf, -1], np.float32)),
    ]
)


def action_samples(space: spaces.Space, n: int, n_states: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States, actions of any space, and returns that depend on both."""
    rng = np.random.default_rng(seed)
    space.seed(seed)
    states = rng.normal(size=(n, n_states)).astype(np.float32)
    is_box = isinstance(space, spaces.Box)
    actions = rng.normal(size=(n, *space.shape)).astype(np.float32) if is_box else np.array([space.sample() for _ in range(n)])
    joint = joint_features(states, actions, space)
    return states, actions, joint @ rng.normal(size=joint.shape[1]) + rng.normal(size=n)


def predict_actions(critic: ActionValues, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    values = critic.predict(th.as_tensor(states), as_sampled(actions))
    assert values.dtype == th.float64 and values.shape == (len(states), 1)
    return values.numpy().flatten()


def fit_actions(critic: ActionValues, states: np.ndarray, actions: np.ndarray, returns: np.ndarray) -> None:
    critic.fit(th.as_tensor(states), as_sampled(actions), returns)


@given(ACTION_SPACES, st.integers(1, 3), st.integers(1, 60), seeds)
def test_action_values_equal_linear_regression_on_states_actions_and_products(
    space: spaces.Space, n_states: int, n: int, seed: int
):
    """On the batch; where it has few samples, or one-hot vectors, many weights are equally good."""
    states, actions, returns = action_samples(space, n, n_states, seed)
    critic = ActionValues(n_states, space)
    fit_actions(critic, states, actions, returns)
    joint = joint_features(states, actions, space)
    expected = LinearRegression().fit(joint, returns).predict(joint)
    np.testing.assert_allclose(predict_actions(critic, states, actions), expected, rtol=1e-3, atol=1e-3)


@given(ACTION_SPACES, st.integers(1, 3), st.integers(2, 60), seeds, st.sampled_from([1e-3, 0.2]))
def test_action_values_with_a_ridge_equal_ridge_on_standardized_features(
    space: spaces.Space, n_states: int, n: int, seed: int, ridge: float
):
    """Of actions that the batch does not have, too."""
    states, actions, returns = action_samples(space, n, n_states, seed)
    critic = ActionValues(n_states, space, ridge=ridge)
    fit_actions(critic, states, actions, returns)
    expected = make_pipeline(StandardScaler(), Ridge(alpha=ridge * n, solver="svd"))
    expected.fit(joint_features(states, actions, space), returns)
    for batch in ((states, actions), action_samples(space, 20, n_states, seed + 1)[:2]):
        found = predict_actions(critic, *batch)
        np.testing.assert_allclose(found, expected.predict(joint_features(*batch, space)), rtol=1e-3, atol=1e-3)


@given(st.integers(2, 5), st.integers(2, 4), st.integers(1, 4), seeds)
def test_action_values_of_one_hot_states_are_the_mean_returns_of_a_table(
    n_states: int, n_actions: int, n_each: int, seed: int
):
    """For every pair of a state and an action: nothing is shared, so that an exact table is found where there is one."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(n_states, n_actions, n_each)) * 10
    states, actions = (part.ravel() for part in np.meshgrid(np.arange(n_states), np.arange(n_actions), indexing="ij"))
    # As many returns of each pair, in any order
    order = rng.permutation(n_states * n_actions * n_each)
    one_hot = np.eye(n_states, dtype=np.float32)
    critic = ActionValues(n_states, spaces.Discrete(n_actions))
    fit_actions(critic, one_hot[np.repeat(states, n_each)[order]], np.repeat(actions, n_each)[order], table.ravel()[order])
    found = predict_actions(critic, one_hot[states], actions).reshape(n_states, n_actions)
    np.testing.assert_allclose(found, table.mean(axis=2), rtol=1e-6, atol=1e-6)


def test_the_number_of_state_features_may_be_an_integer_of_numpy():
    """As SB3 counts those of MultiDiscrete observations."""
    states, actions, returns = action_samples(BOX, 5, 3, seed=0)
    critic = ActionValues(np.int64(3), BOX)  # type: ignore[arg-type]
    fit_actions(critic, states, actions, returns)
    assert predict_actions(critic, states, actions).any()


@pytest.mark.parametrize("space", [BOX, spaces.Discrete(3)], ids=str)
def test_action_values_are_zero_before_the_first_fit(space: spaces.Space):
    states, actions, _ = action_samples(space, 5, 3, seed=0)
    np.testing.assert_array_equal(predict_actions(ActionValues(3, space, memory=0.5, truncate=True), states, actions), 0.0)


def test_actions_beyond_the_bounds_are_worth_what_the_bounds_are():
    """For the environment, they are the same."""
    critic = ActionValues(1, BOX)
    fit_actions(critic, *action_samples(BOX, 100, 1, seed=0))
    states = np.ones((2, 1), np.float32)
    beyond, at = predict_actions(critic, states, np.array([[1.5, -40.0], [1.0, -1.0]], np.float32))
    assert beyond == at != 0


def test_a_best_action_between_the_bounds_is_found():
    """A value that is quadratic in the action, with a best action that depends on the state: no line and no sum shows it."""
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(500, 1)).astype(np.float32), rng.uniform(-1, 1, (500, 1)).astype(np.float32)
    returns = -((actions - 0.5 * states) ** 2).flatten()
    critic = ActionValues(2, spaces.Box(-1, 1, (1,)))
    fit_actions(critic, np.column_stack([states, states**2]), actions, returns)
    values = predict_actions(critic, np.tile(np.float32([0.8, 0.64]), (201, 1)), np.linspace(-1, 1, 201, dtype=np.float32))
    assert np.linspace(-1, 1, 201)[values.argmax()] == pytest.approx(0.4, abs=0.011)


@pytest.mark.parametrize("space", [BOX, spaces.Discrete(4), spaces.MultiBinary(3)], ids=str)
@pytest.mark.parametrize("n_states", [3, 200])
def test_features_in_blocks_are_those_in_one_piece(space: spaces.Space, n_states: int, monkeypatch: pytest.MonkeyPatch):
    """With random projections and without."""
    states, actions, returns = action_samples(space, 50, n_states, seed=0)
    th.manual_seed(0)
    whole = ActionValues(n_states, space, ridge=1e-3)
    fit_actions(whole, states, actions, returns)
    expected = whole.project(th.as_tensor(states), as_sampled(actions))
    sizes: list[int] = []
    for numbers in (1, 7 * whole.features.out_features, 50 * whole.features.out_features - 1):
        monkeypatch.setattr(baselines, "_NUMBERS", numbers)
        pieces = ActionValues(n_states, space, ridge=1e-3)
        pieces.load_state_dict(whole.state_dict())
        sizes.clear()
        pieces.features.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
        assert th.equal(pieces.project(th.as_tensor(states), as_sampled(actions)), expected)
        assert sum(sizes) == 50 and len(sizes) > 1 and max(sizes) == max(1, numbers // whole.features.out_features)
        fit_actions(pieces, states, actions, returns)
        np.testing.assert_array_equal(weights(pieces.linear), weights(whole.linear))


@settings(max_examples=10)
@given(st.integers(80, MAX_FEATURES), st.sampled_from([BOX, spaces.Discrete(5)]), st.sampled_from([0.0, 0.5]), seeds)
def test_many_products_are_fitted_through_random_projections(n_states: int, space: spaces.Space, memory: float, seed: int):
    th.manual_seed(seed)
    critic = ActionValues(n_states, space, ridge=1e-3, memory=memory)
    assert critic.features.out_features > MAX_FEATURES
    states, actions, returns = action_samples(space, 50, n_states, seed)
    projections = critic.project(th.as_tensor(states), as_sampled(actions))
    assert projections.shape == (50, MAX_FEATURES)
    # Every joint feature goes to one of them with a sign
    assert isinstance(critic.linear.project, RandomProjection)
    index, sign = critic.linear.project.index.numpy(), critic.linear.project.sign.numpy()
    expected_projections = np.zeros((50, MAX_FEATURES))
    for feature, column in enumerate(joint_features(states, actions, space).T):
        expected_projections[:, index[feature]] += sign[feature] * column
    np.testing.assert_allclose(projections.numpy(), expected_projections, rtol=1e-4, atol=1e-4)
    fit_actions(critic, states, actions, returns)
    expected = make_pipeline(StandardScaler(), Ridge(alpha=1e-3 * 50, solver="svd")).fit(expected_projections, returns)
    np.testing.assert_allclose(predict_actions(critic, states, actions), expected.predict(expected_projections), rtol=1e-3)


@given(ACTION_SPACES, st.floats(0.05, 0.95), st.lists(st.integers(1, 30), min_size=1, max_size=3), seeds)
def test_the_memory_of_action_values_is_weighted_least_squares_over_all_batches(
    space: spaces.Space, memory: float, sizes: list[int], seed: int
):
    critic = ActionValues(2, space, memory=memory)
    batches = [action_samples(space, n, 2, seed + i) for i, n in enumerate([*sizes, 60])]
    for batch in batches:
        fit_actions(critic, *batch)
    sample_weight = np.concatenate([np.full(len(batch[2]), memory ** (len(sizes) - i)) for i, batch in enumerate(batches)])
    states, actions, returns = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    joint = joint_features(states, actions, space)
    expected = LinearRegression().fit(joint, returns, sample_weight).predict(joint)
    np.testing.assert_allclose(predict_actions(critic, states, actions), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n_states", [3, 200])
def test_the_state_of_action_values_is_all_that_they_need(n_states: int):
    """Weights, memory, bounds of the truncation, random projections."""
    kwargs: dict[str, Any] = dict(ridge=1e-2, memory=0.5, truncate=True)
    critic, twin = ActionValues(n_states, BOX, **kwargs), ActionValues(n_states, BOX, **kwargs)
    states, actions, _ = action_samples(BOX, 500, n_states, seed=2)
    for seed in (0, 1):
        batch = action_samples(BOX, 30, n_states, seed)
        fit_actions(critic, *batch)
        if seed == 0:
            twin.load_state_dict(critic.state_dict())
        else:
            fit_actions(twin, *batch)
        values = predict_actions(critic, states, actions)
        np.testing.assert_array_equal(predict_actions(twin, states, actions), values)
        assert batch[2].min() <= values.min() < values.max() <= batch[2].max()


@pytest.mark.parametrize("space", [BOX, spaces.Discrete(3), spaces.MultiDiscrete([2, 2])], ids=str)
def test_action_values_refuse_samples_that_are_not_finite_and_stay_as_they_are(space: spaces.Space):
    critic = ActionValues(2, space, memory=0.5)
    states, actions, returns = action_samples(space, 20, 2, seed=0)
    fit_actions(critic, states, actions, returns)
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    for spoiled in ((states * np.float32(np.nan), returns), (states, returns * np.inf)):
        with pytest.raises(ValueError, match="NaN, infinite"), np.errstate(invalid="ignore"):
            fit_actions(critic, spoiled[0], actions, spoiled[1])
    for name, value in critic.state_dict().items():
        assert th.equal(value, before[name])
