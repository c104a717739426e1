"""Returns, advantages and normalization, against their definitions in plain Python."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_reinforce.returns import batch_normalize, discounted_returns, steps_to_episode_end

rewards = st.floats(-1e6, 1e6, allow_nan=False, width=32)
batches_of_episodes = st.lists(st.lists(rewards, min_size=1, max_size=40), min_size=1, max_size=8)
discounts = st.floats(0.0, 1.0, exclude_min=True)


def flatten(episodes: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    starts = [step == 0 for episode in episodes for step in range(len(episode))]
    return np.array([reward for episode in episodes for reward in episode]), np.array(starts)


def returns_by_definition(episode: list[float], gamma: float) -> list[float]:
    """G_t = sum over l of gamma^l r_(t+l), term by term."""
    return [sum(gamma**lag * reward for lag, reward in enumerate(episode[start:])) for start in range(len(episode))]


@given(batches_of_episodes, discounts)
def test_returns_follow_the_definition(episodes: list[list[float]], gamma: float):
    expected = [value for episode in episodes for value in returns_by_definition(episode, gamma)]
    scale = max(1.0, max(abs(reward) for episode in episodes for reward in episode))
    np.testing.assert_allclose(discounted_returns(*flatten(episodes), gamma), expected, rtol=1e-12, atol=1e-9 * scale)


@given(batches_of_episodes, discounts)
def test_returns_obey_the_bellman_recursion(episodes: list[list[float]], gamma: float):
    rewards, starts = flatten(episodes)
    returns = discounted_returns(rewards, starts, gamma)
    following = np.append(np.where(starts[1:], 0.0, returns[1:]), 0.0)
    np.testing.assert_allclose(returns, rewards + gamma * following, rtol=1e-9, atol=1e-7)


@given(batches_of_episodes, discounts, st.integers(0, 7), st.floats(-100, 100))
def test_an_episode_does_not_see_the_others(episodes: list[list[float]], gamma: float, changed: int, by: float):
    rewards, starts = flatten(episodes)
    index = np.cumsum(starts) - 1
    changed %= len(episodes)
    others = index != changed
    before = discounted_returns(rewards, starts, gamma)
    after = discounted_returns(np.where(others, rewards, rewards + by), starts, gamma)
    np.testing.assert_array_equal(before[others], after[others])


@given(batches_of_episodes)
def test_steps_to_episode_end_counts_down(episodes: list[list[float]]):
    expected = [step for episode in episodes for step in reversed(range(len(episode)))]
    np.testing.assert_array_equal(steps_to_episode_end(flatten(episodes)[1]), expected)


@pytest.mark.parametrize("starts", [[], [False, True]])
def test_a_batch_has_to_begin_with_an_episode(starts: list[bool]):
    with pytest.raises(ValueError, match="first transition"):
        discounted_returns(np.zeros(len(starts)), np.array(starts), 0.9)


def test_a_long_undiscounted_episode_loses_no_precision():
    n_steps = 100_000
    starts = np.arange(n_steps) == 0
    returns = discounted_returns(np.full(n_steps, 0.1, dtype=np.float32), starts, 1.0)
    np.testing.assert_allclose(returns, np.float64(np.float32(0.1)) * np.arange(n_steps, 0, -1), rtol=1e-12)


def test_memory_is_at_most_three_times_the_arrays():
    rewards, starts = np.ones(200_000), np.arange(200_000) % 200 == 0
    tracemalloc.start()
    discounted_returns(rewards, starts, 0.99)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Arrays: rewards and what is returned for them. (Counting what is allocated: the rewards themselves come on top)
    assert peak <= 3 * (2 * rewards.nbytes)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=100))
def test_normalized_advantages_follow_the_definition(values: list[float]):
    advantages = np.array(values)
    normalized = batch_normalize(advantages)
    if np.ptp(advantages) == 0:
        np.testing.assert_array_equal(normalized, 0.0)
    else:
        mean = sum(values) / len(values)
        std = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
        np.testing.assert_allclose(normalized, [(value - mean) / (std + 1e-8) for value in values], rtol=1e-6, atol=1e-6)


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=50), st.floats(0.1, 1e3), st.floats(-1e3, 1e3))
def test_normalized_advantages_ignore_unit_and_offset(values: list[int], scale: float, shift: float):
    advantages = np.array(values, dtype=float)
    np.testing.assert_allclose(batch_normalize(scale * advantages + shift), batch_normalize(advantages), atol=1e-5)


@pytest.mark.parametrize("value", [0.1, -3.0, 1e10, 1e300])
@pytest.mark.parametrize("n_transitions", [1, 3, 1000])
def test_equal_advantages_become_exactly_zero(value: float, n_transitions: int):
    np.testing.assert_array_equal(batch_normalize(np.full(n_transitions, value)), 0.0)
