"""The rollout buffer: what goes in comes out whole and in order."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from sb3_reinforce.buffers import EpisodeRolloutBuffer
from sb3_reinforce.returns import batch_normalise, discounted_returns

VECTOR = spaces.Box(-np.inf, np.inf, (2,))
BOX = spaces.Box(-1, 1, (2, 3))


def fill(buffer: EpisodeRolloutBuffer, lengths_of_each: list[list[int]]) -> None:
    """Episodes of these lengths, environment by environment; observations are [environment, step number]."""
    n_envs = len(lengths_of_each)
    totals = [sum(lengths) for lengths in lengths_of_each]
    starts = [np.isin(np.arange(total), np.cumsum([0, *ls])) for ls, total in zip(lengths_of_each, totals, strict=True)]
    for step in range(max(totals)):
        obs = np.array([[env, step] for env in range(n_envs)], dtype=np.float32)
        active = np.array([step < total for total in totals])
        start = np.array([step < len(s) and s[step] for s in starts])
        reward = np.array([100.0 * env + step for env in range(n_envs)])
        action = np.stack([np.full(BOX.shape, 10.0 * env + step) for env in range(n_envs)])
        observation = {"v": obs, "d": np.arange(n_envs)} if isinstance(buffer.observation_space, spaces.Dict) else obs
        buffer.add(observation, action, reward, start, active)
    buffer.finish()


lengths = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4)


@given(lengths, st.integers(1, 5))
def test_episodes_are_lined_up_environment_by_environment(lengths_of_each: list[list[int]], buffer_size: int):
    buffer = EpisodeRolloutBuffer(buffer_size, VECTOR, BOX, "cpu", gamma=0.9, n_envs=len(lengths_of_each))
    for _ in range(2):  # the second time over the memory of the first
        buffer.reset()
        assert not buffer.full
        fill(buffer, lengths_of_each)
        assert buffer.full
        expected = [(env, step) for env, ls in enumerate(lengths_of_each) for step in range(sum(ls))]
        np.testing.assert_array_equal(buffer.observations, expected)
        np.testing.assert_array_equal(buffer.rewards, [100 * env + step for env, step in expected])
        np.testing.assert_array_equal(buffer.actions, [np.full(6, 10 * env + step) for env, step in expected])
        starts = [step == 0 for ls in lengths_of_each for length in ls for step in range(length)]
        np.testing.assert_array_equal(buffer.episode_starts, starts)


def test_returns_and_advantages():
    buffer = EpisodeRolloutBuffer(4, VECTOR, BOX, "cpu", gamma=0.9, n_envs=2)
    fill(buffer, [[3, 2], [4]])
    values = np.linspace(-1, 1, 9)
    buffer.compute_returns_and_advantage(values)
    np.testing.assert_array_equal(buffer.returns, discounted_returns(buffer.rewards, buffer.episode_starts, 0.9))
    np.testing.assert_array_equal(buffer.advantages, buffer.returns - values)
    buffer.normalize_advantages()
    np.testing.assert_array_equal(buffer.advantages, batch_normalise(buffer.returns - values))


def test_the_whole_rollout_is_one_batch_in_order():
    buffer = EpisodeRolloutBuffer(4, VECTOR, BOX, "cpu", n_envs=2)
    fill(buffer, [[3, 2], [4]])
    buffer.compute_returns_and_advantage(np.zeros(9))
    (batch,) = buffer.get()
    for name in ("observations", "actions", "advantages", "returns"):
        tensor = getattr(batch, name)
        assert tensor.dtype == th.float32
        np.testing.assert_allclose(tensor.numpy(), getattr(buffer, name), rtol=1e-6)
    assert batch.old_values.shape == (9,)


def test_smaller_batches_are_a_partition():
    buffer = EpisodeRolloutBuffer(4, VECTOR, BOX, "cpu", n_envs=2)
    fill(buffer, [[3, 2], [4]])
    buffer.compute_returns_and_advantage(np.zeros(9))
    batches = list(buffer.get(batch_size=4))
    assert [len(batch.returns) for batch in batches] == [4, 4, 1]
    together = np.concatenate([batch.observations.numpy() for batch in batches])
    assert sorted(map(tuple, together)) == sorted(map(tuple, buffer.observations))


def test_dictionary_observations():
    space = spaces.Dict({"v": VECTOR, "d": spaces.Discrete(5)})
    buffer = EpisodeRolloutBuffer(2, space, BOX, "cpu", n_envs=2)
    fill(buffer, [[3], [1]])
    buffer.compute_returns_and_advantage(np.zeros(4))
    np.testing.assert_array_equal(buffer.observations["v"], [[0, 0], [0, 1], [0, 2], [1, 0]])
    np.testing.assert_array_equal(buffer.observations["d"], [[0], [0], [0], [1]])
    (batch,) = buffer.get()
    assert batch.observations["v"].shape == (4, 2)
    assert batch.observations["d"].dtype == th.int64


def test_actions_of_integer_boxes_are_not_rounded():
    space = spaces.Box(-5, 5, (1,), dtype=np.int32)
    buffer = EpisodeRolloutBuffer(1, VECTOR, space, "cpu")
    buffer.add(np.zeros((1, 2)), np.array([[0.75]], dtype=np.float32), np.zeros(1), np.ones(1), np.ones(1))
    buffer.finish()
    assert buffer.actions[0, 0] == 0.75


def test_an_unfinished_rollout_cannot_be_learned_from():
    buffer = EpisodeRolloutBuffer(1, VECTOR, BOX, "cpu")
    with pytest.raises(AssertionError, match="not finished"):
        next(buffer.get())
