"""The closed-form critics of states and actions against scikit-learn and plain NumPy."""

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
from sb3_reinforce.baselines import MAX_FEATURES, ActionValues, BaselineFeatures, LinearBaseline

BOX = spaces.Box(-1, 1, (2,))
shapes = st.tuples(st.integers(1, 60), st.integers(1, 12))
seeds = st.integers(0, 2**32 - 1)


def samples(shape: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=shape) * 10 ** rng.uniform(-1, 1, size=shape[1]) + rng.normal(size=shape[1])
    return features, 100 * rng.normal(size=shape[0]) + features.sum(axis=1)


def predict(baseline: LinearBaseline, features: np.ndarray) -> np.ndarray:
    return baseline.predict(th.as_tensor(features)).numpy().flatten()


def weights(baseline: LinearBaseline) -> np.ndarray:
    return np.append(baseline.weight.numpy(), baseline.bias.numpy())


@given(shapes, seeds)
def test_the_fit_equals_linear_regression(shape: tuple[int, int], seed: int):
    features, returns = samples(shape, seed)
    baseline = LinearBaseline(shape[1])
    baseline.fit(features, returns)
    expected = LinearRegression().fit(features, returns)
    np.testing.assert_allclose(predict(baseline, features), expected.predict(features), rtol=1e-5, atol=1e-3)
    if shape[0] > 2 * shape[1]:
        np.testing.assert_allclose(weights(baseline), [*expected.coef_, expected.intercept_], rtol=1e-5, atol=1e-4)


@given(shapes, seeds, st.sampled_from([1e-5, 1e-3, 1.0]))
def test_the_fit_with_a_ridge_equals_ridge_on_standardized_features(shape: tuple[int, int], seed: int, ridge: float):
    features, returns = samples(shape, seed)
    baseline = LinearBaseline(shape[1], ridge=ridge)
    baseline.fit(features, returns)
    expected = make_pipeline(StandardScaler(), Ridge(alpha=ridge * shape[0], solver="svd")).fit(features, returns)
    elsewhere, _ = samples(shape, seed + 1)
    np.testing.assert_allclose(predict(baseline, features), expected.predict(features), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(predict(baseline, elsewhere), expected.predict(elsewhere), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("constant", [0.1, -1e6])
@pytest.mark.parametrize("n_samples", [2, 50])
def test_constant_features_get_no_weight(constant: float, n_samples: int):
    rng = np.random.default_rng(0)
    features = np.column_stack([rng.normal(size=n_samples), np.full(n_samples, constant, dtype=np.float32)])
    baseline = LinearBaseline(2)
    baseline.fit(features, rng.normal(size=n_samples))
    assert baseline.weight[0, 1] == 0
    assert np.isfinite(weights(baseline)).all()


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


@pytest.mark.parametrize(
    ("features", "returns"),
    [
        (np.zeros((0, 2)), np.zeros(0)),
        (np.ones((3, 4)), np.zeros(3)),
        (np.array([[1.0, np.nan], [1.0, 2.0]]), np.zeros(2)),
        (np.ones((2, 2)), np.array([1.0, np.inf])),
    ],
)
def test_invalid_samples_are_refused_and_change_nothing(features: np.ndarray, returns: np.ndarray):
    rng = np.random.default_rng(0)
    baseline = LinearBaseline(2, memory=0.5)
    baseline.fit(rng.normal(size=(9, 2)), rng.normal(size=9))
    before = {name: value.clone() for name, value in baseline.state_dict().items()}
    with pytest.raises(ValueError, match="baseline"):
        baseline.fit(features, returns)
    for name, value in baseline.state_dict().items():
        assert th.equal(value, before[name])


def test_random_units_are_determined_by_the_seed():
    features = th.randn(5, 3)
    th.manual_seed(1)
    first = BaselineFeatures(3, n_units=16)
    th.manual_seed(1)
    same = BaselineFeatures(3, n_units=16)
    other = BaselineFeatures(3, n_units=16)
    assert th.equal(first(features), same(features))
    assert not th.equal(first(features), other(features))
    other.load_state_dict(first.state_dict())
    assert th.equal(first(features), other(features))


@given(
    st.lists(st.integers(0, 30_000), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.5, 0.99, 0.9999, 1.0]),
    st.booleans(),
    seeds,
)
def test_features_are_those_of_the_state_the_time_and_random_units_of_both(
    n_steps: list[int], gamma: float, time: bool, seed: int
):
    """The time is in units of the horizon, 1000 steps at most, and 10 at most. It is 0 at the start of an episode."""
    th.manual_seed(seed)
    features, states = BaselineFeatures(2, 4, time, gamma), th.randn(len(n_steps), 2)
    horizon = 1000.0 if gamma > 0.999 else 1 / (1 - gamma)
    for given_steps, numbers in ((th.tensor(n_steps), n_steps), (None, [0] * len(n_steps))):
        found, inputs = features(states, given_steps).numpy(), states.numpy()
        if time:
            inputs = np.column_stack([inputs, [min(n / horizon, 10) for n in numbers]])
        assert found.shape == (len(n_steps), features.out_features)
        np.testing.assert_allclose(found[:, :-4], inputs, rtol=1e-6)
        units = np.tanh(inputs @ features.weight.numpy().T + features.bias.numpy())
        np.testing.assert_allclose(found[:, -4:], units, atol=1e-5)
    baseline = LinearBaseline(features)
    baseline.weight.normal_()
    th.testing.assert_close(baseline(states, th.tensor(n_steps)), baseline.predict(features(states, th.tensor(n_steps))))


def test_truncated_predictions_stay_within_the_returns_of_the_latest_batch():
    """A feature that hardly varies has a large weight, and may vary more in the next batch."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 2)) * [1, 1e-6]
    returns = features @ [1, 1e6] + 3
    probe = np.vstack([features, [[0, 1], [0, -1]]])
    free, truncated = LinearBaseline(2), LinearBaseline(2, truncate=True)
    assert not predict(truncated, probe).any()
    for baseline in (free, truncated):
        baseline.fit(features, returns)
    predictions = predict(truncated, probe)
    np.testing.assert_allclose(predictions[:-2], returns)
    assert list(predictions[-2:]) == [returns.max(), returns.min()]
    assert np.abs(predict(free, probe)).max() > 1e5


# Wide features ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(st.integers(MAX_FEATURES + 1, 1500), seeds, st.sampled_from([0.0, 0.5]))
def test_wide_features_are_fitted_through_random_projections(n_features: int, seed: int, memory: float):
    rng = np.random.default_rng(seed)
    th.manual_seed(seed)
    baseline = LinearBaseline(n_features, ridge=1e-3, memory=memory)
    features, returns = th.randn(50, n_features), rng.normal(size=50)
    projections = baseline.project(features)
    assert projections.shape == (50, MAX_FEATURES)
    baseline.fit(projections.numpy(), returns)
    expected = make_pipeline(StandardScaler(), Ridge(alpha=1e-3 * 50, solver="svd")).fit(projections.numpy(), returns)
    probe = th.randn(5, n_features)
    values = baseline(probe).numpy().flatten()
    np.testing.assert_allclose(values, expected.predict(baseline.project(probe).numpy()), rtol=1e-4, atol=1e-4)


# Features of actions ---------------------------------------------------------------------------------------------------------


def encoded(action: Any, space: spaces.Space, squashed: bool = False) -> list[float]:
    """The encoding of one action, in plain Python."""
    if isinstance(space, spaces.Discrete):
        return [float(action == choice) for choice in range(int(space.n))]
    if isinstance(space, spaces.MultiDiscrete):
        return [float(one == choice) for one, n in zip(action, space.nvec, strict=True) for choice in range(n)]
    if isinstance(space, spaces.MultiBinary):
        return [float(bit) for bit in action]
    assert isinstance(space, spaces.Box)
    triples = zip(np.ravel(action).tolist(), *bounds(space, squashed), strict=True)
    numbers = [min(max(number, low), high) for number, low, high in triples]
    return [*numbers, *(number**2 for number in numbers)]


def bounds(space: spaces.Box, squashed: bool = False) -> tuple[list[float], list[float]]:
    low, high = space.low.ravel().tolist(), space.high.ravel().tolist()
    return ([-1.0] * len(low), [1.0] * len(high)) if squashed else (low, high)


def joint_features(states: np.ndarray, actions: Any, space: spaces.Space, squashed: bool = False) -> np.ndarray:
    """States, actions, and all their products, in plain Python."""
    rows = []
    for state, action in zip(states.tolist(), actions, strict=True):
        numbers = encoded(action, space, squashed)
        rows.append([*state, *numbers, *(one * other for one in state for other in numbers)])
    return np.array(rows)


#: Bounds of one dimension of a Box
BOUNDS = [(-1, 1), (-2, 0.5), (0, 10), (3, 3), (-1e15, 1e15), (-np.inf, np.inf), (0, np.inf), (-np.inf, -2)]


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
    """Actions as the rollout buffer stores them."""
    return th.as_tensor(actions.reshape(len(actions), -1))


def box_actions(space: spaces.Box, n: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian samples, some of them beyond the bounds."""
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
    """Clipped to the bounds, and squared; next to the state, and times the state."""
    rng = np.random.default_rng(seed)
    states, actions = rng.normal(size=(n, n_states)).astype(np.float32), box_actions(space, n, rng)
    critic = ActionValues(n_states, space, squashed)
    found = critic.project(th.as_tensor(states), as_sampled(actions))
    assert found.dtype == th.float32 and found.shape == (n, critic.n_joint)
    np.testing.assert_allclose(found.numpy(), joint_features(states, actions, space, squashed), rtol=1e-5, atol=1e-6)


@given(discrete_spaces, st.integers(0, 4), st.integers(1, 6), seeds)
def test_features_of_discrete_actions_follow_the_definition(space: spaces.Space, n_states: int, n: int, seed: int):
    rng = np.random.default_rng(seed)
    space.seed(seed)
    states, actions = rng.normal(size=(n, n_states)).astype(np.float32), np.array([space.sample() for _ in range(n)])
    critic = ActionValues(n_states, space)
    found = critic.project(th.as_tensor(states), as_sampled(actions))
    assert found.dtype == th.float32 and found.shape == (n, critic.n_joint)
    np.testing.assert_array_equal(found.numpy(), joint_features(states, actions, space).astype(np.float32))


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


@given(ACTION_SPACES, st.integers(1, 3), st.integers(2, 60), seeds, st.sampled_from([1e-3, 0.2]))
def test_action_values_with_a_ridge_equal_ridge_on_standardized_features(
    space: spaces.Space, n_states: int, n: int, seed: int, ridge: float
):
    """In and out of the batch."""
    states, actions, returns = action_samples(space, n, n_states, seed)
    critic = ActionValues(n_states, space, ridge=ridge)
    fit_actions(critic, states, actions, returns)
    expected = make_pipeline(StandardScaler(), Ridge(alpha=ridge * n, solver="svd"))
    expected.fit(joint_features(states, actions, space), returns)
    for batch in ((states, actions), action_samples(space, 20, n_states, seed + 1)[:2]):
        found = predict_actions(critic, *batch)
        np.testing.assert_allclose(found, expected.predict(joint_features(*batch, space)), rtol=1e-3, atol=1e-3)


def test_the_number_of_state_features_may_be_a_numpy_integer():
    """SB3 returns one for MultiDiscrete observations, of their type."""
    assert BaselineFeatures(np.int8(7), n_units=128).out_features == 135  # type: ignore[arg-type]
    states, actions, returns = action_samples(BOX, 5, 3, seed=0)
    critic = ActionValues(np.int64(3), BOX)  # type: ignore[arg-type]
    fit_actions(critic, states, actions, returns)
    assert predict_actions(critic, states, actions).any()


@pytest.mark.parametrize("n_states", [3, 200], ids=["all features", "random projections"])
def test_features_do_not_depend_on_the_size_of_blocks(n_states: int, monkeypatch: pytest.MonkeyPatch):
    space = BOX
    states, actions, returns = action_samples(space, 50, n_states, seed=0)
    th.manual_seed(0)
    whole = ActionValues(n_states, space, ridge=1e-3)
    fit_actions(whole, states, actions, returns)
    expected = whole.project(th.as_tensor(states), as_sampled(actions))
    sizes: list[int] = []
    for numbers in (1, 7 * whole.n_joint, 50 * whole.n_joint - 1):
        monkeypatch.setattr(baselines, "CHUNK", numbers)
        pieces = ActionValues(n_states, space, ridge=1e-3)
        pieces.load_state_dict(whole.state_dict())
        sizes.clear()
        pieces.linear.features.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
        th.testing.assert_close(pieces.project(th.as_tensor(states), as_sampled(actions)), expected)
        assert sum(sizes) == 50 and len(sizes) > 1 and max(sizes) == max(1, numbers // whole.n_joint)
        fit_actions(pieces, states, actions, returns)
        np.testing.assert_allclose(weights(pieces.linear), weights(whole.linear), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("n_states", [3, 200], ids=["all features", "random projections"])
def test_the_state_dict_of_a_critic_is_complete(n_states: int):
    """Weights, memory, bounds of the truncation and random projections: a twin is fitted to the next batch alike."""
    kwargs: dict[str, Any] = dict(ridge=1e-2, memory=0.5, truncate=True)
    critic, twin = ActionValues(n_states, BOX, **kwargs), ActionValues(n_states, BOX, **kwargs)
    states, actions, _ = action_samples(BOX, 500, n_states, seed=2)
    assert not predict_actions(critic, states, actions).any()
    fit_actions(critic, *action_samples(BOX, 30, n_states, seed=0))
    twin.load_state_dict(critic.state_dict())
    batch = action_samples(BOX, 30, n_states, seed=1)
    fit_actions(critic, *batch)
    fit_actions(twin, *batch)
    values = predict_actions(critic, states, actions)
    np.testing.assert_array_equal(predict_actions(twin, states, actions), values)
    assert batch[2].min() <= values.min() < values.max() <= batch[2].max()
