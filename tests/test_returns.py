"""Returns, advantages and normalization, against their definitions in plain Python."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sb3_reinforce.returns import (
    action_advantages,
    batch_normalize,
    discounted_returns,
    monte_carlo_advantages,
    q_advantages,
    steps_to_episode_end,
    td_advantages,
)

rewards = st.floats(-1e6, 1e6, allow_nan=False, width=32)
batches_of_episodes = st.lists(st.lists(rewards, min_size=1, max_size=40), min_size=1, max_size=8)
discounts = st.floats(0.0, 1.0, exclude_min=True)
#: A reward, the value of the state and the value of the action of every transition
transitions = st.tuples(rewards, rewards, rewards)
batches_with_critics = st.lists(st.lists(transitions, min_size=1, max_size=20), min_size=1, max_size=6)


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


# The four advantage functions ------------------------------------------------------------------------------------------------


def columns(episodes: list[list[tuple[float, float, float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, episode starts, values of states and values of actions of a batch."""
    rewards, starts = flatten([[reward for reward, _, _ in episode] for episode in episodes])
    values, action_values = (np.array([row[i] for episode in episodes for row in episode]) for i in (1, 2))
    return rewards, starts, values, action_values


@given(batches_with_critics, discounts)
def test_td_advantages_follow_the_definition(episodes: list[list[tuple[float, float, float]]], gamma: float):
    """r_t + gamma v(s_(t+1)) - v(s_t); nothing is expected after the last transition of an episode."""
    rewards, starts, values, _ = columns(episodes)
    expected = []
    for episode in episodes:
        for step, (reward, value, _) in enumerate(episode):
            next_value = episode[step + 1][1] if step + 1 < len(episode) else 0.0
            expected.append(reward + gamma * next_value - value)
    found = td_advantages(rewards, starts, values, gamma)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-9)


@given(batches_with_critics, discounts)
def test_the_other_advantages_follow_their_definitions(episodes: list[list[tuple[float, float, float]]], gamma: float):
    """G_t - v(s_t), q(s_t, a_t) and q(s_t, a_t) - v(s_t), term by term."""
    rewards, starts, values, action_values = columns(episodes)
    monte_carlo, q, advantage = [], [], []
    for episode in episodes:
        returns = returns_by_definition([reward for reward, _, _ in episode], gamma)
        for following, (_, value, action_value) in zip(returns, episode, strict=True):
            monte_carlo.append(following - value)
            q.append(action_value)
            advantage.append(action_value - value)
    returns = discounted_returns(rewards, starts, gamma)
    np.testing.assert_allclose(monte_carlo_advantages(returns, values), monte_carlo, rtol=1e-9, atol=1e-3)
    np.testing.assert_array_equal(q_advantages(action_values), q)
    np.testing.assert_array_equal(action_advantages(action_values, values), advantage)


@given(batches_with_critics, discounts)
def test_the_discounted_sum_of_td_errors_is_the_monte_carlo_advantage(
    episodes: list[list[tuple[float, float, float]]], gamma: float
):
    """
    The values in between cancel out: from any state to the end of its episode, ``sum_l gamma^l delta_(t+l) = G_t - v(s_t)``,
    which is generalized advantage estimation with lambda = 1. Summed term by term, episode by episode.
    """
    rewards, starts, values, _ = columns(episodes)
    errors = td_advantages(rewards, starts, values, gamma)
    split = np.split(errors, np.flatnonzero(starts)[1:])
    sums = [value for episode in split for value in returns_by_definition(episode.tolist(), gamma)]
    monte_carlo = monte_carlo_advantages(discounted_returns(rewards, starts, gamma), values)
    np.testing.assert_allclose(sums, monte_carlo, rtol=1e-9, atol=1e-3)


@given(batches_with_critics, discounts)
def test_td_advantages_of_exact_values_are_zero(episodes: list[list[tuple[float, float, float]]], gamma: float):
    """Where nothing is left to chance, the return is the value of a state, and no action is better than expected."""
    rewards, starts, _, _ = columns(episodes)
    values = discounted_returns(rewards, starts, gamma)
    np.testing.assert_allclose(td_advantages(rewards, starts, values, gamma), 0.0, atol=1e-6)


@given(batches_with_critics, discounts, st.integers(0, 5), st.floats(1, 1e6))
def test_the_advantages_of_an_episode_do_not_see_the_others(
    episodes: list[list[tuple[float, float, float]]], gamma: float, changed: int, by: float
):
    """The value of the first state of the next episode least of all."""
    index = np.cumsum(columns(episodes)[1]) - 1
    changed %= len(episodes)
    others = index != changed
    shifted = [
        [(reward + by, value - by, action_value + by) for reward, value, action_value in episode]
        if number == changed
        else episode
        for number, episode in enumerate(episodes)
    ]
    results = []
    for batch in (episodes, shifted):
        rewards, starts, values, action_values = columns(batch)
        returns = discounted_returns(rewards, starts, gamma)
        results.append(
            [
                monte_carlo_advantages(returns, values),
                q_advantages(action_values),
                action_advantages(action_values, values),
                td_advantages(rewards, starts, values, gamma),
            ]
        )
    for before, after in zip(*results, strict=True):
        np.testing.assert_array_equal(before[others], after[others])


def test_td_advantages_change_none_of_their_arguments():
    arguments = np.arange(3.0), np.array([True, False, True]), np.array([5.0, 7.0, 11.0])
    copies = [argument.copy() for argument in arguments]
    np.testing.assert_array_equal(td_advantages(*arguments, 0.5), [0 + 0.5 * 7 - 5, 1 - 7, 2 - 11])
    for argument, copy in zip(arguments, copies, strict=True):
        np.testing.assert_array_equal(argument, copy)


# Normalization ---------------------------------------------------------------------------------------------------------------


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
