"""The rollout buffer: what goes in comes out whole and in order."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from sb3_reinforce.episodes.buffer import EpisodeRolloutBuffer
from sb3_reinforce.returns import discounted_returns

VECTOR = spaces.Box(-np.inf, np.inf, (2,))
BOX = spaces.Box(-1, 1, (2, 3))


def fill(buffer: EpisodeRolloutBuffer, lengths_of_each: list[list[int]]) -> None:
    """Episodes of these lengths, environment by environment; observations are [environment, step number]."""
    n_envs = len(lengths_of_each)
    totals = [sum(lengths) for lengths in lengths_of_each]
    starts = [np.isin(np.arange(total), np.cumsum([0, *ls])) for ls, total in zip(lengths_of_each, totals, strict=True)]
    for step in range(max(totals)):
        assert buffer.size() == step
        obs = np.array([[env, step] for env in range(n_envs)], dtype=np.float32)
        active = np.array([step < total for total in totals])
        start = np.array([step < len(s) and s[step] for s in starts])
        reward = np.array([100.0 * env + step for env in range(n_envs)])
        action = np.stack([np.full(BOX.shape, 10.0 * env + step) for env in range(n_envs)])
        observation = {"v": obs, "d": np.arange(n_envs)} if isinstance(buffer.observation_space, spaces.Dict) else obs
        buffer.add(observation, action, reward, start, active)
    buffer.finish()


def filled(lengths_of_each: list[list[int]], space: spaces.Space = VECTOR, **kwargs: Any) -> EpisodeRolloutBuffer:
    buffer = EpisodeRolloutBuffer(4, space, BOX, "cpu", n_envs=len(lengths_of_each), **kwargs)
    fill(buffer, lengths_of_each)
    n_transitions = sum(map(sum, lengths_of_each))
    buffer.compute_returns_and_advantage(np.linspace(-1, 1, n_transitions))
    return buffer


lengths = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4)


@given(lengths, st.integers(1, 5))
def test_episodes_are_contiguous_environment_by_environment(lengths_of_each: list[list[int]], buffer_size: int):
    buffer = EpisodeRolloutBuffer(buffer_size, VECTOR, BOX, "cpu", gamma=0.9, n_envs=len(lengths_of_each))
    for _ in range(2):  # the second time over the memory of the first
        buffer.reset()
        assert not buffer.full
        fill(buffer, lengths_of_each)
        assert buffer.full
        expected = [(env, step) for env, ls in enumerate(lengths_of_each) for step in range(sum(ls))]
        assert buffer.size() == len(expected)
        np.testing.assert_array_equal(buffer.observations, expected)
        np.testing.assert_array_equal(buffer.rewards, [100 * env + step for env, step in expected])
        np.testing.assert_array_equal(buffer.actions, [np.full(6, 10 * env + step) for env, step in expected])
        starts = [step == 0 for ls in lengths_of_each for length in ls for step in range(length)]
        np.testing.assert_array_equal(buffer.episode_starts, starts)


def test_returns_and_advantages():
    buffer = filled([[3, 2], [4]], gamma=0.9)
    values = np.linspace(-1, 1, 9)
    np.testing.assert_array_equal(buffer.values, values)
    np.testing.assert_array_equal(buffer.returns, discounted_returns(buffer.rewards, buffer.episode_starts, 0.9))
    np.testing.assert_array_equal(buffer.advantages, buffer.returns - values)


#: Rewards, starts, returns, values and action values -> advantages, for a discount of 0.9
ADVANTAGES: dict[Any, Callable[..., np.ndarray]] = {
    "monte_carlo": lambda rewards, starts, returns, v, q: returns - v,
    "q": lambda rewards, starts, returns, v, q: q,
    "advantage": lambda rewards, starts, returns, v, q: q - v,
    "td": lambda rewards, starts, returns, v, q: rewards + 0.9 * np.where(np.roll(starts, -1), 0, np.roll(v, -1)) - v,
}


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_the_advantage_function_is_the_one_asked_for(advantage: Any):
    """For whole episodes of two environments; returns are those that followed, whatever tells how good an action was."""
    buffer = filled([[3, 2], [4]], gamma=0.9)
    values, action_values = np.linspace(-1, 1, 9), np.linspace(5, 3, 9) ** 2
    buffer.compute_returns_and_advantage(values, action_values, advantage)
    returns = discounted_returns(buffer.rewards, buffer.episode_starts, 0.9)
    np.testing.assert_array_equal(buffer.returns, returns)
    np.testing.assert_array_equal(buffer.values, values)
    np.testing.assert_array_equal(buffer.action_values, action_values)
    expected = ADVANTAGES[advantage](buffer.rewards, buffer.episode_starts, returns, values, action_values)
    np.testing.assert_allclose(buffer.advantages, expected, rtol=1e-12)
    # The values that come with the samples are those of states
    (batch,) = buffer.get()
    np.testing.assert_allclose(batch.old_values, values, rtol=1e-6)
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-6)
    np.testing.assert_allclose(batch.returns, returns, rtol=1e-6)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_action_values_are_needed_where_the_advantage_function_has_them(advantage: Any):
    buffer = filled([[3, 2], [4]])
    if advantage in ("q", "advantage"):
        with pytest.raises(AssertionError, match=f"advantage='{advantage}' needs action values"):
            buffer.compute_returns_and_advantage(np.zeros(9), advantage=advantage)
    else:
        buffer.compute_returns_and_advantage(np.zeros(9), advantage=advantage)
        assert buffer.action_values is None


SAMPLES = {"observations": "observations", "actions": "actions", "old_values": "values"} | {
    name: name for name in ("advantages", "returns")
}


@pytest.mark.parametrize("batch_size", [None, 1, 4, 9, 100])
def test_get_yields_all_transitions_once_and_in_order(batch_size: int | None):
    buffer = filled([[3, 2], [4]])
    batches = list(buffer.get() if batch_size is None else buffer.get(batch_size))
    assert {len(batch.returns) for batch in batches[:-1]} <= {batch_size}
    assert len(batches) == (1 if batch_size is None else -(-9 // batch_size))
    for name, attribute in SAMPLES.items():
        parts = [getattr(batch, name) for batch in batches]
        assert all(part.dtype == th.float32 for part in parts)
        np.testing.assert_allclose(th.cat(parts).numpy(), getattr(buffer, attribute), rtol=1e-6)


@given(lengths, st.integers(1, 60))
def test_spread_yields_evenly_spaced_transitions(lengths_of_each: list[list[int]], max_size: int):
    """From the first on, at most so many, and as many as a whole number of steps between them allows."""
    buffer = filled(lengths_of_each)
    step = next(step for step in range(1, 200) if len(range(0, buffer.size(), step)) <= max_size)
    samples = buffer.spread(max_size)
    for name, attribute in SAMPLES.items():
        np.testing.assert_allclose(getattr(samples, name).numpy(), getattr(buffer, attribute)[::step], rtol=1e-6)


def test_sample_draws_transitions_uniformly_with_replacement():
    """With NumPy's global generator, as SB3 does it; five standard errors."""
    buffer = filled([[3, 2], [4]])
    np.random.seed(0)
    samples = buffer.sample(9000)
    rows = {tuple(observation): index for index, observation in enumerate(buffer.observations)}
    indices = np.array([rows[tuple(observation)] for observation in samples.observations.numpy()])
    counts = np.bincount(indices, minlength=9)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 8 / 9)
    # Every row of a sample is a transition
    for name, attribute in SAMPLES.items():
        np.testing.assert_allclose(getattr(samples, name).numpy(), getattr(buffer, attribute)[indices], rtol=1e-6)
    np.random.seed(0)
    assert th.equal(buffer.sample(9000).returns, samples.returns)


def test_dictionary_observations():
    buffer = filled([[3], [1]], spaces.Dict({"v": VECTOR, "d": spaces.Discrete(5)}))
    observations: Any = buffer.observations
    np.testing.assert_array_equal(observations["v"], [[0, 0], [0, 1], [0, 2], [1, 0]])
    np.testing.assert_array_equal(observations["d"], [[0], [0], [0], [1]])
    (batch,) = buffer.get()
    assert batch.observations["v"].shape == (4, 2)
    assert batch.observations["d"].dtype == th.int64
    assert buffer.sample(3).observations["v"].shape == (3, 2)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.uint8, np.int32])
def test_observations_keep_their_type(dtype: type):
    space = spaces.Box(0, 200, (1,), dtype)  # type: ignore[arg-type]
    buffer = EpisodeRolloutBuffer(1, space, BOX, "cpu")
    value = np.array([[100 + 2**-40]], dtype=dtype)
    buffer.add(value, np.zeros((1, 2, 3)), np.zeros(1), np.ones(1, dtype=bool), np.ones(1, dtype=bool))
    buffer.finish()
    (batch,) = buffer.get()
    assert batch.observations.numpy().dtype == dtype
    np.testing.assert_array_equal(batch.observations, value)


def test_actions_of_integer_boxes_are_not_rounded():
    space = spaces.Box(-5, 5, (1,), dtype=np.int32)
    buffer = EpisodeRolloutBuffer(1, VECTOR, space, "cpu")
    ones = np.ones(1, dtype=bool)
    buffer.add(np.zeros((1, 2)), np.array([[0.75]], dtype=np.float32), np.zeros(1), ones, ones)
    buffer.finish()
    assert buffer.actions[0, 0] == 0.75


def test_a_finished_rollout_stays_as_it_is_while_the_next_one_is_added():
    """Nothing of the old one may be overwritten, where environments are copied out of the rows."""
    buffer = filled([[3, 2], [4]])
    actions, rewards = buffer.actions, buffer.rewards
    copies = actions.copy(), rewards.copy()
    buffer.reset()
    ones = np.ones(2, dtype=bool)
    for _ in range(9):
        buffer.add(np.full((2, 2), -1), np.full((2, 2, 3), -1), np.full(2, -1), ones, ones)
    np.testing.assert_array_equal(actions, copies[0])
    np.testing.assert_array_equal(rewards, copies[1])


def test_an_unfinished_rollout_cannot_be_learned_from():
    buffer = EpisodeRolloutBuffer(1, VECTOR, BOX, "cpu")
    ones = np.ones(1, dtype=bool)
    buffer.add(np.zeros((1, 2)), np.zeros((1, 2, 3)), np.zeros(1), ones, ones)
    with pytest.raises(AssertionError):
        next(buffer.get())
    with pytest.raises(AssertionError):
        buffer.spread(1)
    with pytest.raises(AssertionError):
        buffer.sample(1)
