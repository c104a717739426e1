"""The rollout buffer: whole episodes in order, samples, and the first value that is not finite."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from sb3_reinforce.episodes.buffer import EpisodeRolloutBuffer, all_finite

VECTOR = spaces.Box(-np.inf, np.inf, (2,))
BOX = spaces.Box(-1, 1, (2, 3))
DICT = spaces.Dict(v=VECTOR, d=spaces.Discrete(5))
ONE = np.ones(1, dtype=bool)


def make_steps(lengths_of_each: list[list[int]], is_dict: bool = False) -> list[tuple[Any, ...]]:
    """Arguments of ``add()``: observations are [sub-environment, step], rewards and actions 100 and 10 times that."""
    n_envs, totals = len(lengths_of_each), [sum(lengths) for lengths in lengths_of_each]
    starts = [np.isin(np.arange(max(totals)), np.cumsum([0, *lengths[:-1]])) for lengths in lengths_of_each]
    steps = []
    for step in range(max(totals)):
        obs: Any = np.array([[env, step] for env in range(n_envs)], dtype=np.float32)
        active = np.array([step < total for total in totals])
        reward = np.array([100.0 * env + step for env in range(n_envs)])
        action = np.stack([np.full(BOX.shape, 10.0 * env + step) for env in range(n_envs)])
        obs = {"v": obs, "d": np.arange(n_envs)} if is_dict else obs
        steps.append((obs, action, reward, np.array([start[step] for start in starts]), active))
    return steps


def filled(lengths_of_each: list[list[int]], space: spaces.Space = VECTOR) -> EpisodeRolloutBuffer:
    buffer = EpisodeRolloutBuffer(4, space, BOX, "cpu", n_envs=len(lengths_of_each))
    for step in make_steps(lengths_of_each, space is DICT):
        buffer.add(*step)
    assert buffer.finish() is None
    buffer.returns = np.linspace(3, 9, buffer.size())
    buffer.advantages = np.linspace(-1, 1, buffer.size())
    return buffer


lengths = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4)


@given(lengths, st.booleans())
def test_episodes_are_contiguous_and_ordered_by_sub_environment(lengths_of_each: list[list[int]], is_dict: bool):
    buffer: Any = EpisodeRolloutBuffer(1, DICT if is_dict else VECTOR, BOX, "cpu", n_envs=len(lengths_of_each))
    expected = [(env, step) for env, ls in enumerate(lengths_of_each) for step in range(sum(ls))]
    for _ in range(2):
        buffer.reset()
        assert not buffer.full
        for n_steps, step in enumerate(make_steps(lengths_of_each, is_dict)):
            assert buffer.size() == n_steps
            buffer.add(*step)
        assert buffer.finish() is None
        assert buffer.full and buffer.size() == len(expected)
        np.testing.assert_array_equal(buffer.observations["v"] if is_dict else buffer.observations, expected)
        np.testing.assert_array_equal(buffer.rewards, [100 * env + step for env, step in expected])
        assert buffer.values.shape == buffer.rewards.shape and not buffer.values.any()
        np.testing.assert_array_equal(buffer.actions, [np.full(6, 10 * env + step) for env, step in expected])
        starts = [step == 0 for ls in lengths_of_each for length in ls for step in range(length)]
        np.testing.assert_array_equal(buffer.episode_starts, starts)


@pytest.mark.parametrize("is_dict", [False, True])
def test_whole_episodes_are_added_like_their_steps(is_dict: bool):
    space = DICT if is_dict else VECTOR
    stepwise, whole = filled([[3, 1, 4]], space), EpisodeRolloutBuffer(1, space, BOX, "cpu")
    steps = make_steps([[3, 1, 4]], is_dict)
    for part in (steps[:3], steps[3:4], steps[4:]):
        obs, *columns = zip(*part, strict=True)
        joined: Any = {key: np.concatenate([o[key] for o in obs]) for key in obs[0]} if is_dict else np.concatenate(obs)
        whole.add(joined, *map(np.concatenate, columns))
    assert whole.size() == 8
    assert whole.finish() is None
    for name in ("actions", "rewards", "episode_starts"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(stepwise, name))
    np.testing.assert_equal(whole.observations, stepwise.observations)


SAMPLES = dict(observations="observations", actions="actions", old_values="values", advantages="advantages", returns="returns")


@pytest.mark.parametrize("rows", [None, np.array([1, 2, 5, 8])])
@pytest.mark.parametrize("batch_size", [None, 1, 4, 9, 100])
def test_get_yields_the_transitions_of_all_or_some_rows_in_order(batch_size: int | None, rows: np.ndarray | None):
    buffer, n_rows = filled([[3, 2], [4]]), 9 if rows is None else 4
    batches = list(buffer.get(batch_size, rows))
    assert {len(batch.returns) for batch in batches[:-1]} <= {batch_size}
    assert len(batches) == (1 if batch_size is None else -(-n_rows // batch_size))
    for name, attribute in SAMPLES.items():
        parts = [getattr(batch, name) for batch in batches]
        assert all(part.dtype == th.float32 for part in parts)
        expected = getattr(buffer, attribute)[slice(None) if rows is None else rows]
        np.testing.assert_allclose(th.cat(parts).numpy(), expected, rtol=1e-6)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 50), st.sampled_from([np.int64, np.uint8, np.float32])
)
def test_states_are_evenly_spaced_and_equal_integers_are_taken_once(values: list[int], max_states: int, dtype: type):
    buffer: Any = filled([[len(values)]])
    buffer.observations = np.array(values, dtype=dtype)[:, None]
    rows, counts = buffer.sample_states(max_states)
    spaced = np.arange(0, len(values), -(-len(values) // max_states))
    assert len(spaced) <= max_states
    taken = buffer.observations[rows, 0]
    assert rows.dtype.kind == "i" and counts.dtype == th.float32 and np.isin(rows, spaced).all()
    if dtype is np.float32:
        np.testing.assert_array_equal(rows, spaced)
        assert counts.tolist() == [1.0] * len(rows)
    else:
        assert len(set(taken.tolist())) == len(taken)
        repeated = np.repeat(taken, counts.numpy().astype(int))
        np.testing.assert_array_equal(np.sort(repeated), np.sort(np.array(values)[spaced]))


def test_samples_of_dictionaries_are_dictionaries():
    buffer: Any = filled([[3], [1]], DICT)
    np.testing.assert_array_equal(buffer.observations["d"], [[0], [0], [0], [1]])
    (batch,) = buffer.get()
    assert batch.observations["v"].shape == (4, 2)
    assert batch.observations["d"].dtype == th.int64


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.uint8, np.int32])
def test_observations_keep_their_type_and_actions_of_integer_boxes_are_not_rounded(dtype: type):
    buffer: Any = EpisodeRolloutBuffer(1, spaces.Box(0, 200, (1,), dtype), spaces.Box(-5, 5, (1,), np.int32), "cpu")  # type: ignore
    value, action = np.array([[100 + 2**-40]], dtype=dtype), np.array([[0.75]], dtype=np.float32)
    buffer.add(value, action, np.zeros(1), ONE, ONE)
    buffer.finish()
    (batch,) = buffer.get()
    assert batch.observations.numpy().dtype == dtype
    np.testing.assert_array_equal(batch.observations, value)
    assert batch.actions.item() == 0.75


@pytest.mark.filterwarnings("error")
def test_values_that_overflow_float32_become_infinite_in_samples():
    buffer = filled([[3]])
    buffer.returns[1] = 1e300
    (batch,) = buffer.get()
    assert th.isinf(batch.returns).tolist() == [False, True, False]


def test_an_unfinished_rollout_has_no_samples():
    buffer = EpisodeRolloutBuffer(1, VECTOR, BOX, "cpu")
    buffer.add(*make_steps([[1]])[0])
    with pytest.raises(AssertionError, match="not finished"):
        next(buffer.get())


# Values that are not finite --------------------------------------------------------------------------------------------------


def first_not_finite(steps: list[tuple[Any, ...]]) -> tuple[str, Any, int, int, int] | None:
    """Look at one value after the other: by step, sub-environment, and observation, action, reward."""
    position, episodes = -1, {}
    # Number all episodes in the order of their starts
    for n_step, (_, _, _, starts, active) in enumerate(steps):
        for env in np.flatnonzero(starts & active).tolist():
            position += 1
            episodes[n_step, env] = position
    for n_step, (obs, action, reward, _, active) in enumerate(steps):
        entries = {f"observation {key!r}": obs[key] for key in obs} if isinstance(obs, dict) else {"observation": obs}
        for env in np.flatnonzero(active).tolist():
            for name, entry in {**entries, "action": action, "reward": reward}.items():
                if not all(np.isfinite(value) for value in np.ravel(entry[env]).tolist()):
                    start = max(step for step, other in episodes if other == env and step <= n_step)
                    return name, entry[env], env, episodes[start, env], n_step - start
    return None


@given(lengths, st.booleans(), st.data())
def test_the_first_value_that_is_not_finite_is_found(lengths_of_each: list[list[int]], is_dict: bool, data: st.DataObject):
    """Values of idle sub-environments are ignored."""
    steps = make_steps(lengths_of_each, is_dict)
    buffer = EpisodeRolloutBuffer(1, DICT if is_dict else VECTOR, BOX, "cpu", n_envs=len(lengths_of_each))
    for _ in range(data.draw(st.integers(0, 4))):
        obs, action, reward, *_ = data.draw(st.sampled_from(steps))
        array = data.draw(st.sampled_from([obs["v"] if is_dict else obs, action, reward]))
        entry = array[data.draw(st.integers(0, len(array) - 1)), ...]
        entry.flat[data.draw(st.integers(0, entry.size - 1))] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    for step in steps:
        buffer.add(*step)
    found, expected = buffer.finish(), first_not_finite(steps)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert (found[0], *found[2:]) == (expected[0], *expected[2:])
        np.testing.assert_array_equal(found[1], expected[1])


@given(st.lists(st.floats(width=32), max_size=8), st.sampled_from([np.float16, np.float32, np.float64]))
@pytest.mark.filterwarnings("error")
def test_all_finite_agrees_with_a_look_at_every_value(values: list[float], dtype: type):
    with np.errstate(over="ignore"):
        array = np.array(values).astype(dtype)
    expected = all(np.isfinite(value) for value in array.tolist())
    assert all_finite(array) == expected
    assert all_finite(np.stack([array, array]).T) == expected


@pytest.mark.filterwarnings("error")
def test_all_finite_takes_values_whose_squares_overflow_and_all_types():
    for dtype in (np.float16, np.float32, np.float64):
        assert all_finite(np.full(10, np.finfo(dtype).max))
        assert not all_finite(np.array([np.finfo(dtype).max, np.nan]))
    for values in (np.zeros(3, dtype=np.uint8), np.zeros((0, 2)), np.array(["a"]), np.array([True])):
        assert all_finite(values)
