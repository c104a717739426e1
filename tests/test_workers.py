"""Whole episodes from an executor: ranges of episodes, their order, errors, and what workers can be."""

import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes.schedule import EpisodeSchedule
from sb3_reinforce.episodes.tasks import Episode
from sb3_reinforce.episodes.vec_env import wrap_env
from sb3_reinforce.episodes.workers import Workers
from tests.envs import RandomEnv, RandomLengthEnv, subproc
from tests.executors import FakeExecutor

#: A policy that takes little time to make
SMALL: dict[str, Any] = dict(policy_kwargs=dict(net_arch=[]), baseline=None)
MAKE = partial(RandomLengthEnv, 9)


def an_episode(number: int, n_steps: int) -> Episode:
    """An episode whose rewards are its number."""
    zeros = np.zeros(n_steps)
    return Episode(zeros, zeros, zeros, zeros + number, [{}] * n_steps)


def number_of(episode: Episode) -> int:
    return int(episode.rewards[0])


def runner(length: Callable[[int], int]) -> Callable[[range], Any]:
    """Runs ranges of episodes whose lengths depend on their numbers."""
    return lambda numbers: ([an_episode(number, length(number)) for number in numbers], None)


def batch(workers: Workers, next_number: int = 0, n_steps: int = 0, n_episodes: int = 0) -> list[Episode]:
    """Collect the episodes of a batch, and check the counters of its schedule."""
    schedule = EpisodeSchedule(1, n_steps, n_episodes, next_number)
    episodes = []
    for episode in workers.episodes(b"config", schedule):
        episodes.append(episode)
        assert (schedule.n_started, schedule.next_number) == (len(episodes), next_number + len(episodes))
        assert schedule.n_transitions == sum(len(episode.rewards) for episode in episodes)
    return episodes


# Ranges and order of episodes

targets = st.builds(
    lambda name, n: {name: n}, st.sampled_from(["n_steps", "n_episodes"]), st.one_of(st.integers(1, 12), st.integers(1, 200))
)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    n_workers=st.integers(1, 6),
    batches=st.lists(targets, min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_episodes_come_in_order_whatever_completes_first(
    lengths: list[int], n_workers: int, batches: list[dict[str, int]], seed: int
):
    """A batch ends with the first episode that completes it."""

    def length(number: int) -> int:
        return lengths[number % len(lengths)]

    executor = FakeExecutor(n_workers, runner(length), np.random.default_rng(seed))
    workers = Workers(executor)
    next_number = n_used = 0
    for target in batches:
        last, n_steps = next_number, length(next_number)
        while n_steps < target.get("n_steps", 0) or last + 1 - next_number < target.get("n_episodes", 0):
            last += 1
            n_steps += length(last)
        episodes = batch(workers, next_number, **target)
        expected = [(number, length(number)) for number in range(next_number, last + 1)]
        assert [(number_of(episode), len(episode.rewards)) for episode in episodes] == expected
        next_number, n_used = last + 1, n_used + n_steps
        assert workers.mean_steps == n_steps / len(episodes)
    assert executor.most_waiting <= 2 * n_workers
    n_run = sum(len(episode.rewards) for result, _ in executor.results for episode in result)
    assert workers.n_discarded == n_run - n_used


@given(n_workers=st.integers(1, 5), sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_n_episodes_are_submitted_once_in_ranges_that_shrink(n_workers: int, sizes: list[int], seed: int):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 100, sum(sizes))
    executor = FakeExecutor(n_workers, runner(lambda number: int(lengths[number])), rng)
    workers = Workers(executor)
    next_number = 0
    for index, n_episodes in enumerate(sizes):
        executor.submitted.clear()
        batch(workers, next_number, n_episodes=n_episodes)
        counts = list(map(len, executor.submitted))
        assert sum(map(list, executor.submitted), []) == list(range(next_number, next_number + n_episodes))  # noqa: RUF017
        if index == 0:
            # Their lengths are not known yet
            assert set(counts[: 2 * n_workers]) == {1}
        else:
            assert counts[0] == math.ceil(n_episodes / (2 * n_workers))
            assert all(one >= other for one, other in pairwise(counts)) and counts[-1] == 1
        next_number += n_episodes
    assert workers.n_discarded == 0


@pytest.mark.parametrize("target", [dict(n_episodes=1000), dict(n_steps=10_000)])
def test_a_batch_needs_few_calls(target: dict[str, int]):
    executor = FakeExecutor(4, runner(lambda number: 10))
    workers = Workers(executor)
    batch(workers, 0, n_episodes=1)
    executor.submitted.clear()
    assert len(batch(workers, 1, **target)) == 1000 and len(executor.submitted) < 50


@given(n_workers=st.integers(1, 5), length=st.integers(1, 50), n_steps=st.integers(1, 1000))
def test_nothing_is_discarded_if_all_episodes_have_one_length(n_workers: int, length: int, n_steps: int):
    executor = FakeExecutor(n_workers, runner(lambda number: length))
    workers = Workers(executor)
    n_first = len(batch(workers, n_steps=n_steps))
    assert sum(map(len, executor.submitted)) <= max(n_first, n_workers)
    executor.submitted.clear()
    n_second = len(batch(workers, n_first, n_steps=n_steps))
    assert sum(map(len, executor.submitted)) == n_second == math.ceil(n_steps / length) and workers.n_discarded == 0


@pytest.mark.parametrize("factor", [0.1, 10])
def test_few_episodes_are_discarded_if_lengths_change(factor: float):
    executor = FakeExecutor(4, runner(lambda number: 100 if number < 50 else int(100 * factor)))
    workers = Workers(executor)
    assert len(batch(workers, n_steps=5000)) == 50
    executor.submitted.clear()
    executor.ran.clear()
    n_used = len(batch(workers, 50, n_steps=5000))
    assert n_used == 50 / factor and sum(map(len, executor.submitted)) <= max(50, n_used)
    n_ran = sum(map(len, executor.ran))
    assert n_ran <= n_used + math.ceil(50 / 8) and workers.n_discarded == 100 * factor * (n_ran - n_used)


# Errors


@pytest.mark.parametrize("action", ["stops", "raises"])
def test_a_callback_that_ends_training_cancels_waiting_tasks(action: str):
    executor = FakeExecutor(4)
    model = REINFORCE("MlpPolicy", MAKE, seed=0, n_steps=None, n_episodes=8, workers=executor, **SMALL)

    def callback(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        if action == "raises":
            raise KeyError("mine")
        return False

    try:
        model.learn(1, callback=callback)
    except KeyError:
        assert action == "raises"
    assert executor.waiting and all(future.cancelled() for future, *_ in executor.waiting)
    assert model._n_updates == 0


@pytest.mark.parametrize("seed", range(3))
def test_an_error_is_raised_only_if_the_batch_needs_its_episode(seed: int):
    """Episodes before it are used, also those of the same range."""

    def run(numbers: range) -> Any:
        good = [an_episode(number, 10) for number in numbers if number < 30]
        return good, None if len(good) == len(numbers) else OSError(f"Episode {numbers[len(good)]}")

    executor = FakeExecutor(4, run, np.random.default_rng(seed))
    workers = Workers(executor)
    # All but the first of these batches know how long episodes are, and run ranges of several
    for n_episodes in (10, 19):
        assert len(batch(workers, n_steps=10 * n_episodes)) == n_episodes
    assert list(map(number_of, batch(workers, 25, n_steps=45))) == [25, 26, 27, 28, 29]
    episodes = workers.episodes(b"config", EpisodeSchedule(1, 60, 0, 25))
    assert [number_of(next(episodes)) for _ in range(5)] == [25, 26, 27, 28, 29]
    with pytest.raises(OSError, match="Episode 30"):
        next(episodes)
    assert all(future.cancelled() for future, *_ in executor.waiting)


@pytest.mark.parametrize("when", ["running", "submitting"])
def test_a_dead_worker_is_an_error_that_names_the_episodes(when: str):
    executor = FakeExecutor(2, runner(lambda number: 5), breaks_after=3)
    workers = Workers(executor)
    assert len(batch(workers, n_episodes=2)) == 2
    schedule = EpisodeSchedule(1, 0, 20, 2)
    if when == "submitting":
        executor.n_left = -1
    with pytest.raises(RuntimeError, match=r"The episodes (\d+) to (\d+) could not run \(.*\): a worker died, or") as info:
        list(workers.episodes(b"config", schedule))
    # With known lengths, ranges have several episodes. The second one failed while it was running
    first, last = (2, 6) if when == "submitting" else (7, 10)
    assert f"The episodes {first} to {last} " in str(info.value) and schedule.next_number == first
    assert type(info.value.__cause__).__name__ == "BrokenExecutor"


def test_an_executor_that_is_shut_down_is_an_error():
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    expected = r"The episodes 4 to 4 could not run \(cannot schedule.*\): .* the executor of workers=... is shut down"
    with pytest.raises(RuntimeError, match=expected):
        batch(Workers(executor), 4, n_episodes=1)


# Rollouts


def steps_of(workers: Any, **kwargs: Any) -> tuple[REINFORCE, list[dict[str, Any]]]:
    """Train for one batch, and keep the local variables of each step."""
    steps: list[dict[str, Any]] = []

    def keep(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        names = ("obs", "actions", "clipped_actions", "new_obs", "rewards", "dones", "n_steps", "n_rollout_steps", "active")
        assert locals_["model"] is model and locals_["env"] is model.env and locals_["rollout_buffer"] is model.rollout_buffer
        infos = [{key: value for key, value in info.items() if key != "episode"} for info in locals_["infos"]]
        # In this process, an episode that ends has started the next one
        schedule = dict(numbers=locals_["schedule"].numbers.copy(), seeds=[*locals_["schedule"].seeds])
        steps.append({name: locals_[name] for name in names} | dict(infos=infos, num_timesteps=model.num_timesteps))
        steps[-1] |= {} if locals_["dones"][0] else schedule
        return True

    model = REINFORCE(**(dict(policy="MlpPolicy", env=MAKE, seed=3, n_steps=40, n_episodes=None, workers=workers) | kwargs))
    return model.learn(1, callback=keep), steps


DICTIONARY = dict(
    policy="MultiInputPolicy",
    env=partial(RandomEnv, spaces.Dict(vector=spaces.Box(-1, 1, (3,)), choice=spaces.Discrete(3)), spaces.Box(-1, 1, (2,)), 7),
)


@pytest.mark.parametrize("kwargs", [{}, DICTIONARY, dict(max_episode_steps=4)], ids=["vector", "dictionary", "time_limit"])
def test_a_rollout_on_workers_equals_one_in_this_process(kwargs: dict[str, Any]):
    """Callbacks see the same steps, except that no observation follows the last one of an episode, which is repeated."""
    model, steps = steps_of(FakeExecutor(2, rng=np.random.default_rng(0)), **kwargs)
    other, expected = steps_of(None, **kwargs)
    assert len(steps) == len(expected) == model.num_timesteps
    for mine, theirs in zip(steps, expected, strict=True):
        new_obs, their_new_obs = mine.pop("new_obs"), theirs.pop("new_obs")
        np.testing.assert_equal(new_obs, mine["obs"] if mine["dones"][0] else their_new_obs)
        np.testing.assert_equal(mine, theirs)
    assert [info["l"] for info in model.ep_info_buffer or ()] == [info["l"] for info in other.ep_info_buffer or ()]
    for name in ("observations", "actions", "rewards", "episode_starts", "values", "returns", "advantages"):
        np.testing.assert_equal(getattr(model.rollout_buffer, name), getattr(other.rollout_buffer, name))
    assert model.logger.name_to_value["time/discarded_steps"] >= 0


# Executors


class OwnExecutor(Executor):
    """An executor with attributes like those of ``distributed`` or ``mpi4py``."""

    def __init__(self, **attributes: Any):
        self.__dict__.update(attributes)


def dask_client(*n_threads: int) -> Any:
    return SimpleNamespace(ncores=lambda: {f"tcp://{index}": n for index, n in enumerate(n_threads)})


def test_the_number_of_workers_is_that_of_the_executor():
    with ThreadPoolExecutor(3) as threads, ProcessPoolExecutor(2) as processes:
        assert Workers(threads).count() == 3
        assert Workers(processes).count() == 2
    assert Workers(OwnExecutor(num_workers=7)).count() == 7
    assert Workers(OwnExecutor()).count() == os.cpu_count()
    assert Workers(OwnExecutor(_client=dask_client(2, 3))).count() == 5
    # Tasks wait for the workers of a cluster
    assert Workers(OwnExecutor(_client=dask_client())).count() == 1


def test_a_given_executor_is_not_stopped():
    with ThreadPoolExecutor(1) as executor:
        REINFORCE("MlpPolicy", MAKE, workers=executor, **SMALL).learn(30)
        assert executor.submit(abs, -1).result() == 1


def test_loky_is_needed_only_to_learn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "loky", None)
    model = REINFORCE("MlpPolicy", "CartPole-v1", workers=2, **SMALL)
    model.predict(np.zeros(4))
    with pytest.raises(ImportError, match=r"pip install 'sb3-reinforce\[workers\]'"):
        model.learn(1)


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "2", [], np.float64(2)])
def test_other_workers_are_refused(workers: Any):
    with pytest.raises(ValueError, match=r"workers must be an integer of at least 1, or None, got workers="):
        REINFORCE("MlpPolicy", "CartPole-v1", workers=workers, **SMALL)


def test_executors_that_fork_and_daemonic_processes_are_refused(monkeypatch: pytest.MonkeyPatch):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as executor:
        with pytest.raises(ValueError, match=r"workers=.* forks this process, .*give it mp_context"):
            REINFORCE("MlpPolicy", "CartPole-v1", workers=executor, **SMALL)
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=True))
    with pytest.raises(ValueError, match=r"workers=2 cannot start processes in a daemonic one, .*: use workers=None"):
        REINFORCE("MlpPolicy", "CartPole-v1", workers=2, **SMALL)


@pytest.mark.parametrize("use", ["get_attr", "env_method"])
def test_callbacks_do_not_reach_the_environments_of_workers(use: str):
    model = REINFORCE("MlpPolicy", MAKE, workers=FakeExecutor(1), **SMALL)
    with pytest.raises(RuntimeError, match="Workers have their own environments"):
        model.learn(1, callback=lambda locals_, globals_: getattr(model.env, use)("close") is None)
    model.env.get_attr("seeds")  # type: ignore[union-attr]


# Environments

ACCEPTED: dict[str, Any] = {
    "id": "CartPole-v1",
    "spec": gym.spec("CartPole-v1"),
    "function": lambda: RandomLengthEnv(9),
    "function_of_vec_env": lambda: make_vec_env("CartPole-v1", 1),
}
REFUSED: dict[str, Callable[[], Any]] = {
    "environment": lambda: gym.make("CartPole-v1"),
    "dummy_vec_env": lambda: make_vec_env("CartPole-v1", 1),
    "subproc_vec_env": lambda: subproc([lambda: gym.make("CartPole-v1")]),
    "vec_normalize": lambda: VecNormalize(wrap_env("CartPole-v1")),
    "frame_stack": lambda: VecFrameStack(wrap_env("CartPole-v1"), 2),
    "function_of_several": lambda: lambda: make_vec_env("CartPole-v1", 2),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_workers_make_environments(name: str):
    kwargs = dict(seed=0, n_steps=None, n_episodes=2, **SMALL)
    models = [REINFORCE("MlpPolicy", ACCEPTED[name], workers=workers, **kwargs) for workers in (FakeExecutor(1), None)]
    np.testing.assert_array_equal(*(model.learn(1).policy.parameters_to_vector() for model in models))


@pytest.mark.parametrize("name", REFUSED)
def test_environments_that_workers_cannot_make_are_refused(name: str):
    """By the constructor and learn()."""
    env = REFUSED[name]()
    expected = r"workers=2 cannot use the environment .* id, an EnvSpec, or a function .*normalize_observations"
    with pytest.raises(ValueError, match=expected):
        REINFORCE("MlpPolicy", env, workers=2, **SMALL)
    model = REINFORCE("MlpPolicy", env, **SMALL, normalize_observations=False)
    model.workers = 2
    with pytest.raises(ValueError, match=expected):
        model.learn(1)
    model.workers = None
    assert model.num_timesteps == 0 and model.learn(1).num_timesteps > 0
    model.env.close()  # type: ignore[union-attr]
