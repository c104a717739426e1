"""Whole episodes from an executor: what is sent, which ranges, in which order they come back, and what is refused."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TransformReward
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecFrameStack, VecNormalize

from sb3_reinforce import REINFORCE, jobs
from sb3_reinforce.episodes.schedule import EpisodeSchedule, episode_seed
from sb3_reinforce.episodes.tasks import Episode, Job, _make_env, _unpack, run_episodes
from sb3_reinforce.episodes.vec_env import wrap_env
from sb3_reinforce.episodes.workers import MAX_TRIES, EnvFactory, Workers, attach_workers, make_job
from sb3_reinforce.tools.envpool import EnvPoolVecEnv
from sb3_reinforce.tools.ray import RayExecutor
from tests.envs import RandomEnv, RandomLengthEnv, ScriptedEnv, subproc
from tests.executors import FakeExecutor, FakeRay

VECTOR = spaces.Box(-1, 1, (3,))
PAIR = spaces.Box(-1, 1, (2,))
#: A policy that is made in no time
SMALL: dict[str, Any] = dict(policy_kwargs=dict(net_arch=[]), baseline=None)


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    """This process has run no task yet."""
    vars(jobs._LATEST).clear()
    yield
    vars(jobs._LATEST).clear()


def job_of(make: Any, policy: str = "MlpPolicy", **kwargs: Any) -> tuple[Job, REINFORCE]:
    """The job of the first batch of a model, and that model."""
    model = REINFORCE(policy, make, **(dict(seed=3) | kwargs))
    return make_job(model), model


def assert_same(one: Any, other: Any) -> None:
    """Episodes, or what is in them, are the same to the last bit; times of the monitors aside."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one.keys() - {"t"}:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    else:
        assert one == other


# What is sent ----------------------------------------------------------------------------------------------------------------


def make_with(thing: Any) -> gym.Env:
    return RandomLengthEnv(5)


def test_an_environment_that_cannot_be_sent_is_refused():
    job, _ = job_of(partial(make_with, threading.Lock()), **SMALL)
    with pytest.raises(ValueError, match=r"cannot be sent to workers: .*lock.* by its id, or by a function that makes it"):
        job.pack()


def test_a_policy_that_cannot_be_sent_is_refused():
    job, model = job_of(partial(RandomLengthEnv, 5), **SMALL)
    model.policy.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"the policy cannot be sent to workers: .*lock"):
        job.pack()


def test_the_optimizer_and_gradients_stay_here():
    job, model = job_of(partial(RandomLengthEnv, 5))
    model.learn(30)
    sent = cloudpickle.loads(job.pack()).policy
    assert not hasattr(sent, "optimizer")
    assert all(parameter.grad is None for parameter in sent.parameters())
    assert model.policy.optimizer.param_groups
    for name, value in model.policy.state_dict().items():
        assert th.equal(value, sent.state_dict()[name])


def test_of_a_compiled_policy_the_original_is_sent():
    job, model = job_of(partial(RandomLengthEnv, 5), **SMALL)
    compiled: Any = SimpleNamespace(_orig_mod=model.policy, lock=threading.Lock())
    assert type(cloudpickle.loads(replace(job, policy=compiled).pack()).policy) is type(model.policy)
    assert job.policy is model.policy


# In a worker -----------------------------------------------------------------------------------------------------------------

#: Every environment that :func:`make_counted` has made
MADE: list[gym.Env] = []


class Closing(RandomLengthEnv):
    closed = False

    def close(self) -> None:
        self.closed = True


def make_counted() -> gym.Env:
    env = Closing(5)
    MADE.append(env)
    return env


@pytest.fixture
def made() -> Iterator[list[gym.Env]]:
    MADE.clear()
    yield MADE
    MADE.clear()


def test_a_job_is_unpacked_once_and_its_environment_is_kept(made: list[Closing]):
    job, model = job_of(make_counted, **SMALL)
    content = job.pack()
    made.clear()
    first = _unpack("one", content)
    env = _make_env(first)
    assert _unpack("one", content) is first and _make_env(first) is env

    with th.no_grad():
        model.policy.log_std += 1
    changed = _unpack("two", job.pack())
    assert _make_env(changed) is env
    assert th.equal(changed.policy.log_std, model.policy.log_std)
    assert not th.equal(first.policy.log_std, model.policy.log_std)
    assert len(made) == 1 and not made[0].closed


def test_another_environment_takes_the_place_of_the_one_before(made: list[Closing]):
    jobs_ = [job_of(make_counted, **SMALL)[0] for _ in range(2)]
    made.clear()
    envs = [_make_env(job) for job in jobs_]
    assert len(made) == 2 and envs[0] is not envs[1]
    assert [env.closed for env in made] == [True, False]


def test_threads_have_environments_of_their_own(made: list[Closing]):
    job = job_of(make_counted, **SMALL)[0]
    made.clear()
    envs = [_make_env(job)]
    thread = threading.Thread(target=lambda: envs.append(_make_env(job)))
    thread.start()
    thread.join()
    assert envs[0] is not envs[1]
    assert len(made) == 2 and not any(env.closed for env in made)


def make_other_space(kind: str) -> gym.Env:
    """Of other spaces after the first time."""
    MADE.append(RandomEnv(VECTOR, PAIR, 5))
    other = spaces.Box(-1, 1, (4,))
    if len(MADE) == 1:
        return MADE[0]
    return RandomEnv(other, PAIR, 5) if kind == "observation" else RandomEnv(VECTOR, other, 5)


@pytest.mark.parametrize("kind", ["observation", "action"])
def test_another_space_in_a_worker_is_an_error(made: list[gym.Env], kind: str):
    content = job_of(partial(make_other_space, kind), **SMALL)[0].pack()
    with pytest.raises(ValueError, match=rf"made in a worker has the {kind}_space Box\(-1.0, 1.0, \(4,\).* the same"):
        run_episodes("a", content, 0, 1)


def test_a_job_goes_on_after_another_one_could_not_make_its_environment(made: list[gym.Env]):
    good = job_of(make_counted, **SMALL)[0].pack()
    made.clear()
    bad = job_of(partial(make_other_space, "action"), **SMALL)[0].pack()
    before = run_episodes("good", good, 0, 2)
    with pytest.raises(ValueError, match="made in a worker"):
        run_episodes("bad", bad, 0, 1)
    assert_same(run_episodes("good again", good, 0, 2), before)


def kept_dict_env() -> gym.Env:
    return RandomEnv(spaces.Dict(v=VECTOR, d=spaces.Discrete(3)), PAIR, 7)


KINDS: dict[str, dict[str, Any]] = {
    "continuous": dict(make=partial(RandomLengthEnv, 9)),
    "discrete": dict(make=partial(RandomLengthEnv, 9, spaces.Discrete(3))),
    "gsde": dict(make=partial(RandomLengthEnv, 9), use_sde=True, sde_sample_freq=2),
    "dictionary": dict(make=kept_dict_env, policy="MultiInputPolicy"),
    "id": dict(make="CartPole-v1"),
    "spec": dict(make=gym.spec("CartPole-v1")),
    "time_limit": dict(make=partial(RandomLengthEnv, 9), max_episode_steps=3),
    "unseeded_environment": dict(make=partial(ScriptedEnv, [3]), seed=None),
}
every_kind = pytest.mark.parametrize("kwargs", [pytest.param(kwargs, id=name) for name, kwargs in KINDS.items()])


@every_kind
def test_episodes_are_those_of_this_process(kwargs: dict[str, Any]):
    """All that is in them, for the first batch of a model."""
    job, model = job_of(**kwargs, n_episodes=12)
    content = job.pack()
    steps: list[tuple[Any, ...]] = []

    def note(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        values = np.ravel(locals_["act"].values)
        names = ("obs", "actions", "clipped_actions", "rewards", "infos", "dones")
        steps.append((*(locals_[name] for name in names), values))
        return True

    model.learn(1, callback=note)
    episodes = run_episodes("a", content, 0, 12)
    assert [episode.number for episode in episodes] == list(range(12))
    ends = np.cumsum([episode.n_steps for episode in episodes])
    assert ends[-1] == len(steps) == model.num_timesteps
    assert [bool(step[5][0]) for step in steps] == [t + 1 in ends for t in range(len(steps))]
    for episode, end in zip(episodes, ends, strict=True):
        for t, step in enumerate(steps[end - episode.n_steps : end]):
            row = slice(t, t + 1)
            observations = episode.observations
            own = {k: v[row] for k, v in observations.items()} if isinstance(observations, dict) else observations[row]
            # The scripted one counts how often it was reset
            if isinstance(job.env, partial) and job.env.func is ScriptedEnv:
                own, step = own[:, 2], (step[0][:, 2], *step[1:])
                episode = episode._replace(rewards=step[3].repeat(episode.n_steps), infos=step[4] * episode.n_steps)
            assert_same(dict(own) if isinstance(own, dict) else own, dict(step[0]) if isinstance(own, dict) else step[0])
            assert_same([episode.actions[row], episode.clipped_actions[row], episode.rewards[row]], list(step[1:4]))
            assert_same(episode.infos[row], step[4])
            np.testing.assert_array_equal(episode.values[row], step[6])


@pytest.fixture(scope="module")
def packed() -> list[bytes]:
    """Jobs with continuous and discrete actions, and a dictionary of observations."""
    return [job_of(**KINDS[name])[0].pack() for name in ("continuous", "discrete", "gsde", "dictionary")]


@settings(max_examples=40)
@given(
    kind=st.integers(0, 3),
    first=st.one_of(st.integers(0, 20), st.integers(0, 10**9)),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    rng=st.randoms(use_true_random=False),
)
def test_any_ranges_give_the_same_episodes(packed: list[bytes], kind: int, first: int, sizes: list[int], rng: Any):
    """In any order, some of them twice."""
    content = packed[kind]
    whole = run_episodes(f"whole {kind}", content, first, sum(sizes))
    starts = [first + sum(sizes[:index]) for index in range(len(sizes))]
    order = [*range(len(sizes)), rng.randrange(len(sizes))]
    rng.shuffle(order)
    parts = {index: run_episodes(f"parts {kind}", content, starts[index], sizes[index]) for index in order}
    assert_same([episode for index in range(len(sizes)) for episode in parts[index]], whole)


class TwoArguments(Exception):
    """Cannot be unpickled, as it is with many exceptions whose authors did not think of it."""

    def __init__(self, one: str, other: str):
        super().__init__(f"{one} {other}")


def make_or_raise(how: str) -> gym.Env:
    """Raises after the first time."""
    MADE.append(RandomLengthEnv(5))
    if len(MADE) > 1:
        raise TwoArguments(how, "disk")
    return MADE[0]


def test_an_environment_that_cannot_be_made_in_a_worker_is_an_error_that_can_be_sent(made: list[gym.Env]):
    content = job_of(partial(make_or_raise, "full"), **SMALL)[0].pack()
    with pytest.raises(Exception, match="full disk") as caught:
        run_episodes("a", content, 0, 1)
    assert "full disk" in str(cloudpickle.loads(cloudpickle.dumps(caught.value)))


class Failing(RandomLengthEnv):
    """Raises in the last step, or in the reset, of the episodes with some seeds."""

    def __init__(self, what: str, seeds: list[int]):
        super().__init__(9)
        self.what = what
        self.bad_seeds = seeds

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        if self.what == "reset" and seed in self.bad_seeds:
            raise OSError("The simulator is gone")
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        step = super().step(action)
        if self.what == "step" and step[2] and self.seeds[-1] in self.bad_seeds:
            raise OSError("The simulator is gone")
        return step


def test_what_was_complete_before_a_failure_comes_back():
    """Then the episode that has failed fails again, with its number and the seed of its environment, and others do not."""
    seed = episode_seed(3, 5)
    content = job_of(partial(Failing, "step", [seed]), **SMALL)[0].pack()
    assert [episode.number for episode in run_episodes("a", content, 2, 6)] == [2, 3, 4]
    for n_episodes in (1, 3):
        with pytest.raises(RuntimeError, match=rf"OSError in step\(\) .*episode 5.*reset\(seed={seed}\).*simulator is gone"):
            run_episodes("a", content, 5, n_episodes)
    assert [episode.number for episode in run_episodes("a", content, 6, 2)] == [6, 7]


def test_a_reset_that_fails_costs_no_episode_before_it():
    content = job_of(partial(Failing, "reset", [episode_seed(3, 5)]), **SMALL)[0].pack()
    assert [episode.number for episode in run_episodes("a", content, 2, 6)] == [2, 3, 4]
    assert [episode.number for episode in run_episodes("a", content, 4, 2)] == [4]


@pytest.mark.parametrize("first", [5, 4])
def test_a_reset_that_fails_is_told_with_its_episode_and_seed(first: int):
    seed = episode_seed(3, 5)
    content = job_of(partial(Failing, "reset", [seed]), **SMALL)[0].pack()
    with pytest.raises(RuntimeError, match=rf"OSError in reset\(.*episode 5\b.*{seed}.*simulator is gone"):
        for number in (first, 5):
            run_episodes("a", content, number, 2)


class Threads(RandomLengthEnv):
    def step(self, action: Any) -> Any:
        *step, info = super().step(action)
        return *step, {"threads": th.get_num_threads()}


def test_pytorch_has_as_many_threads_as_in_the_main_process():
    job, _ = job_of(partial(Threads, 5), **SMALL)
    for n_threads in (2, 1):
        (episode,) = run_episodes(f"{n_threads} threads", replace(job, n_threads=n_threads).pack(), 0, 1)
        assert {info["threads"] for info in episode.infos} == {n_threads}
        assert th.get_num_threads() == 1


# Which ranges are run, and in which order episodes come back -----------------------------------------------------------------

JOB: Any = SimpleNamespace(pack=lambda: b"content")


def an_episode(number: int, n_steps: int) -> Episode:
    zeros = np.zeros(n_steps)
    return Episode(number, zeros, zeros, zeros, zeros, zeros, [{}] * n_steps)


def runner(length: Callable[[int], int]) -> Callable[[int, int], list[Episode]]:
    """What runs ranges of episodes whose lengths follow from their numbers."""
    return lambda first, n_episodes: [an_episode(number, length(number)) for number in range(first, first + n_episodes)]


def batch(workers: Workers, next_number: int = 0, n_steps: int = 0, n_episodes: int = 0) -> list[Episode]:
    """The episodes of a batch, of which the schedule has kept count."""
    schedule = EpisodeSchedule(1, n_steps, n_episodes, next_number)
    episodes = []
    for episode in workers.episodes(JOB, schedule):
        episodes.append(episode)
        assert schedule.n_started == len(episodes)
        assert schedule.n_transitions == sum(episode.n_steps for episode in episodes)
        assert schedule.next_number == next_number + len(episodes)
    return episodes


targets = st.builds(
    lambda name, n: {name: n}, st.sampled_from(["n_steps", "n_episodes"]), st.one_of(st.integers(1, 12), st.integers(1, 200))
)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    n_workers=st.integers(1, 6),
    batches=st.lists(targets, min_size=1, max_size=4),
    cuts=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_numbers_come_in_order_whatever_completes_first(
    lengths: list[int], n_workers: int, batches: list[dict[str, int]], cuts: bool, seed: int
):
    """Each once and none is missing, up to the first at which there is enough; also of tasks that come back in part."""
    rng = np.random.default_rng(seed)

    def length(number: int) -> int:
        return lengths[number % len(lengths)]

    def run(first: int, n_episodes: int) -> list[Episode]:
        n_run = int(rng.integers(1, n_episodes, endpoint=True)) if cuts else n_episodes
        return runner(length)(first, n_run)

    executor = FakeExecutor(n_workers, run, rng)
    workers = Workers(executor)
    next_number = n_used = 0
    for target in batches:
        last, n_steps = next_number, length(next_number)
        while n_steps < target.get("n_steps", 0) or last + 1 - next_number < target.get("n_episodes", 0):
            last += 1
            n_steps += length(last)
        episodes = batch(workers, next_number, **target)
        assert [(episode.number, episode.n_steps) for episode in episodes] == [
            (number, length(number)) for number in range(next_number, last + 1)
        ]
        next_number, n_used = last + 1, n_used + n_steps
        assert workers.mean_steps == n_steps / len(episodes)
    assert executor.most_waiting <= 2 * n_workers
    # What ran beyond the end of a batch is counted; what did not run any more is not
    assert workers.n_discarded == sum(episode.n_steps for result in executor.results for episode in result) - n_used


@given(n_workers=st.integers(1, 5), sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_nothing_runs_beyond_n_episodes(n_workers: int, sizes: list[int], seed: int):
    """Each episode is submitted once: large ranges first, single ones at the end."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 100, sum(sizes))
    executor = FakeExecutor(n_workers, runner(lambda number: int(lengths[number])), rng)
    workers = Workers(executor)
    next_number = 0
    for index, n_episodes in enumerate(sizes):
        executor.submitted.clear()
        batch(workers, next_number, n_episodes=n_episodes)
        starts, counts = zip(*executor.submitted, strict=True)
        assert starts == tuple(next_number + np.cumsum([0, *counts[:-1]]))
        assert sum(counts) == n_episodes
        if index == 0:
            # Nobody knows yet how long they are
            assert set(counts[: 2 * n_workers]) == {1}
        else:
            assert counts[0] == math.ceil(n_episodes / (2 * n_workers))
            assert all(one >= other for one, other in pairwise(counts)) and counts[-1] == 1
        next_number += n_episodes
    assert workers.n_discarded == 0


def test_a_batch_costs_few_calls():
    executor = FakeExecutor(4, runner(lambda number: 10))
    workers = Workers(executor)
    batch(workers, 0, n_episodes=1)
    for target in (dict(n_episodes=1000), dict(n_steps=10_000)):
        executor.submitted.clear()
        assert len(batch(workers, 1, **target)) == 1000
        assert len(executor.submitted) < 50


def test_the_first_batch_begins_with_an_episode_for_each_worker():
    """A wanted number of steps says nothing of how many episodes that is."""
    n_known: list[int] = []

    def run(first: int, n_episodes: int) -> list[Episode]:
        n_known.append(len(executor.submitted))
        return runner(lambda number: 10)(first, n_episodes)

    executor = FakeExecutor(3, run)
    batch(Workers(executor), n_steps=1000)
    assert executor.submitted[:3] == [(0, 1), (1, 1), (2, 1)]
    assert n_known[0] == 3
    assert len(executor.submitted) > 4


@given(n_workers=st.integers(1, 5), length=st.integers(1, 50), n_steps=st.integers(1, 1000))
def test_nothing_is_thrown_away_when_all_episodes_are_of_one_length(n_workers: int, length: int, n_steps: int):
    executor = FakeExecutor(n_workers, runner(lambda number: length))
    workers = Workers(executor)
    n_first = len(batch(workers, n_steps=n_steps))
    n_ran = sum(n_episodes for _, n_episodes in executor.submitted)
    assert n_ran <= max(n_first, n_workers)
    executor.submitted.clear()
    n_second = len(batch(workers, n_first, n_steps=n_steps))
    assert sum(n_episodes for _, n_episodes in executor.submitted) == n_second == math.ceil(n_steps / length)


@pytest.mark.parametrize("factor", [0.1, 10])
def test_what_runs_ahead_is_bounded_when_lengths_change(factor: float):
    """Episodes that have become longer leave no more to throw away than the batch was expected to have."""
    executor = FakeExecutor(4, runner(lambda number: 100 if number < 50 else int(100 * factor)))
    workers = Workers(executor)
    assert len(batch(workers, n_steps=5000)) == 50
    executor.submitted.clear()
    executor.ran.clear()
    n_used = len(batch(workers, 50, n_steps=5000))
    assert n_used == 50 / factor
    assert sum(n_episodes for _, n_episodes in executor.submitted) <= max(50, n_used)
    # Few of them have run
    assert sum(n_episodes for _, n_episodes in executor.ran) <= n_used + math.ceil(50 / 8)


def test_each_batch_has_a_name_of_its_own():
    names: list[str] = []

    class Noting(FakeExecutor):
        def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
            assert function is run_episodes and args[1] == b"content"
            names.append(args[0])
            return super().submit(function, *args, **kwargs)

    n_tasks = []
    for _ in range(2):
        workers = Workers(Noting(2, runner(lambda number: 1)))
        for number in range(3):
            batch(workers, number, n_episodes=2)
            n_tasks.append(len(names))
    assert len(set(names)) == 6
    assert all(len(set(names[start:stop])) == 1 for start, stop in pairwise([0, *n_tasks]))


def test_a_batch_that_is_left_early_cancels_what_has_not_begun():
    executor = FakeExecutor(4, runner(lambda number: 5))
    workers = Workers(executor)
    episodes = workers.episodes(JOB, EpisodeSchedule(1, 0, 8))
    assert next(episodes).number == 0
    episodes.close()  # type: ignore[attr-defined]
    assert executor.waiting and all(future.cancelled() for future, *_ in executor.waiting)


def test_a_callback_that_stops_cancels_what_has_not_begun():
    executor = FakeExecutor(4)
    model = REINFORCE("MlpPolicy", partial(RandomLengthEnv, 9), seed=0, n_episodes=8, workers=executor, **SMALL)
    model.learn(1, callback=lambda locals_, globals_: False)
    assert executor.waiting and all(future.cancelled() for future, *_ in executor.waiting)


def test_a_callback_that_raises_cancels_what_has_not_begun():
    """At once, although the traceback keeps all that was going on alive."""
    executor = FakeExecutor(4)
    model = REINFORCE("MlpPolicy", partial(RandomLengthEnv, 9), seed=0, n_episodes=8, workers=executor, **SMALL)

    def callback(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        model.learn(1, callback=callback)
    assert caught.tb
    assert executor.waiting and all(future.cancelled() for future, *_ in executor.waiting)


def test_what_a_worker_raises_is_raised_when_its_turn_comes():
    """Not before: the batch may not need it."""

    def run(first: int, n_episodes: int) -> list[Episode]:
        if first >= 3:
            raise OSError(f"Episode {first}")
        return [an_episode(first, 10)]

    executor = FakeExecutor(4, run, np.random.default_rng(0))
    workers = Workers(executor)
    assert [episode.number for episode in batch(workers, n_steps=25)] == [0, 1, 2]
    episodes = workers.episodes(JOB, EpisodeSchedule(1, 35, 0))
    assert [next(episodes).number for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="Episode 3"):
        next(episodes)
    assert all(future.cancelled() for future, *_ in executor.waiting)


# Workers that die ------------------------------------------------------------------------------------------------------------


def start_again(monkeypatch: pytest.MonkeyPatch, *executors: FakeExecutor) -> list[FakeExecutor]:
    """Have loky start these executors, one after the other; the list that is returned loses what was started."""
    left = list(executors)
    monkeypatch.setattr(Workers, "_start", lambda self: left.pop(0))
    return left


@pytest.mark.parametrize("seed", range(20))
def test_workers_that_die_now_and_then_change_nothing(monkeypatch: pytest.MonkeyPatch, seed: int):
    """And no episode that was complete runs again."""
    rng = np.random.default_rng(seed)
    run = runner(lambda number: 1 + number % 7)
    # Tasks run in their order: the first of those that are missing is always done next
    executors = [FakeExecutor(3, run, breaks_after=int(rng.integers(1, 4))) for _ in range(100)]
    left = start_again(monkeypatch, *executors)
    workers = Workers(3)
    next_number = 0
    for target in (dict(n_steps=60), dict(n_episodes=20)):
        for executor in executors:
            executor.ran.clear()
        episodes = batch(workers, next_number, **target)
        assert [episode.number for episode in episodes] == list(range(next_number, next_number + len(episodes)))
        ran = [number for executor in executors for first, n in executor.ran for number in range(first, first + n)]
        assert sorted(ran) == sorted(set(ran))
        next_number += len(episodes)
    assert next_number == 17 + 20
    assert len(left) < 95


def test_what_was_complete_when_workers_died_is_used(monkeypatch: pytest.MonkeyPatch):
    first = FakeExecutor(2, runner(lambda number: 5))
    second = FakeExecutor(2, runner(lambda number: 5))
    start_again(monkeypatch, first, second)
    workers = Workers(2)
    episodes = workers.episodes(JOB, EpisodeSchedule(1, 0, 4))
    assert next(episodes).number == 0
    # Episodes 1 to 3 wait: the last one is completed, then the workers die
    first.waiting.reverse()
    first.run_one()
    first.waiting.reverse()
    first.n_left = 0
    assert [episode.number for episode in episodes] == [1, 2, 3]
    assert first.ran == [(0, 1), (3, 1)] and second.submitted == second.ran == [(1, 1), (2, 1)]


@pytest.mark.parametrize("when", ["running", "submitting"])
def test_workers_that_die_again_and_again_are_an_error(monkeypatch: pytest.MonkeyPatch, when: str):
    executors = [FakeExecutor(2, runner(lambda number: 5), breaks_after=0) for _ in range(MAX_TRIES + 1)]
    for executor in executors:
        executor.is_broken = when == "submitting"
    left = start_again(monkeypatch, *executors)
    workers = Workers(2)
    with pytest.raises(RuntimeError, match=r"died 3 times in a row while the episodes 0 to 0 .*BrokenExecutor.*memory"):
        batch(workers, n_episodes=5)
    assert len(left) == 1


def test_an_executor_that_was_given_is_not_started_again():
    executor = FakeExecutor(2, runner(lambda number: 5), breaks_after=1)
    with pytest.raises(
        RuntimeError, match=r"A worker has died 1 times? .*the episodes 1 to 1 .*BrokenExecutor: a worker has died"
    ):
        batch(Workers(executor), n_episodes=5)


def test_other_errors_are_no_reason_to_try_again(monkeypatch: pytest.MonkeyPatch):
    def run(first: int, n_episodes: int) -> list[Episode]:
        raise ZeroDivisionError

    executor = FakeExecutor(2, run)
    start_again(monkeypatch, executor)
    with pytest.raises(ZeroDivisionError):
        batch(Workers(2), n_episodes=1)
    assert len(executor.ran) == 1


def test_an_executor_that_is_shut_down_is_an_error():
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(RuntimeError, match=r"takes no more tasks \(cannot schedule.*\): give one that is running"):
        batch(Workers(executor), n_episodes=1)


def test_an_executor_that_was_given_is_not_shut_down():
    executor = ThreadPoolExecutor(1)
    model = REINFORCE("MlpPolicy", partial(RandomLengthEnv, 9), workers=executor, **SMALL)
    model.learn(30)
    assert executor.submit(abs, -1).result() == 1
    executor.shutdown()


# Episodes that take too long -------------------------------------------------------------------------------------------------


class Slow(RandomLengthEnv):
    """Some episodes take seconds: (seed, seconds) of each. The others take ``usual`` seconds."""

    def __init__(self, seconds: dict[int, float], usual: float = 0.0):
        super().__init__(9)
        self.seconds = seconds
        self.usual = usual

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        assert seed is not None
        time.sleep(self.seconds.get(seed, self.usual))
        return super().reset(seed=seed, options=options)


@pytest.mark.parametrize("first", [0, 3])
def test_an_episode_that_takes_too_long_is_an_error(first: int):
    """What was complete before it comes back, and the environment that hangs is not used again."""
    seed = episode_seed(3, 3)
    content = job_of(partial(Slow, {seed: 3.0}), **SMALL, episode_timeout=0.2)[0].pack()
    if first < 3:
        assert [episode.number for episode in run_episodes("a", content, first, 6)] == list(range(first, 3))
    before = time.monotonic()
    expected = rf"The episode 3 \(reset\(seed={seed}\)\) has not ended within episode_timeout=0.2 seconds"
    with pytest.raises(RuntimeError, match=expected):
        run_episodes("a", content, 3, 2)
    assert time.monotonic() - before < 2
    assert [episode.number for episode in run_episodes("a", content, 4, 2)] == [4, 5]


def test_the_time_is_that_of_one_episode():
    """A range of episodes, or waiting for a worker, may take longer."""
    content = job_of(partial(Slow, {}, 0.1), **SMALL, episode_timeout=0.4)[0].pack()
    assert len(run_episodes("a", content, 0, 10)) == 10


def test_a_time_limit_changes_nothing_of_the_episodes():
    job, _ = job_of(partial(RandomLengthEnv, 9))
    without = run_episodes("a", job.pack(), 0, 8)
    assert_same(run_episodes("b", replace(job, episode_timeout=60.0).pack(), 0, 8), without)


@pytest.mark.parametrize("episode_timeout", [0, -1.0, math.nan, math.inf, "1", True])
def test_episode_timeout_is_checked(episode_timeout: Any):
    with pytest.raises(ValueError, match="episode_timeout must be a finite number above 0, or None, got"):
        REINFORCE("MlpPolicy", "CartPole-v1", episode_timeout=episode_timeout, **SMALL)


# What workers can be ---------------------------------------------------------------------------------------------------------


class FakeClient:
    """``distributed.Client`` with threads on some workers."""

    def __init__(self, *n_threads: int):
        self.n_threads = n_threads

    def ncores(self) -> dict[str, int]:
        return {f"tcp://{index}": n for index, n in enumerate(self.n_threads)}


class OwnExecutor(Executor):
    """As ``distributed`` or ``mpi4py`` make it: with attributes of its own."""

    def __init__(self, **attributes: Any):
        self.__dict__.update(attributes)


def test_the_number_of_workers_is_that_of_the_executor():
    with ThreadPoolExecutor(3) as threads, ProcessPoolExecutor(2) as processes:
        assert Workers(threads).count() == 3
        assert Workers(processes).count() == 2
    dask = OwnExecutor(_client=FakeClient(2, 3))
    assert Workers(dask).count() == 5
    # Workers may come and go
    dask._client = FakeClient(1)  # type: ignore[attr-defined]
    assert Workers(dask).count() == 1
    assert Workers(OwnExecutor(num_workers=7)).count() == 7
    assert Workers(OwnExecutor()).count() == os.cpu_count()


@pytest.mark.parametrize("target", [dict(n_steps=20), dict(n_episodes=3)])
def test_a_cluster_may_have_no_workers_yet(target: dict[str, int]):
    """Those of Slurm take minutes; tasks wait for them."""
    executor: Any = FakeExecutor(1, runner(lambda number: 10))
    del executor._max_workers
    executor._client = FakeClient()
    assert batch(Workers(executor), **target)


def test_a_number_of_workers_is_loky_s(monkeypatch: pytest.MonkeyPatch):
    """An executor of its own, which is stopped when learning ends: others may use the one that loky shares."""
    started: list[tuple[int, dict[str, Any]]] = []
    stopped: list[dict[str, Any]] = []

    def make(n_processes: int, **kwargs: Any) -> Any:
        started.append((n_processes, kwargs))
        return SimpleNamespace(shutdown=lambda **kwargs: stopped.append(kwargs))

    monkeypatch.setitem(sys.modules, "loky", SimpleNamespace(ProcessPoolExecutor=make))
    workers = Workers(5)
    assert workers.count() == started[0][0] == 5
    assert len(started) == 1 and not stopped
    workers.close()
    assert stopped == [dict(wait=True, kill_workers=True)]
    Workers(OwnExecutor()).close()
    assert len(started) == len(stopped) == 1


def test_a_callback_may_train_another_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Workers, "_start", lambda self: ThreadPoolExecutor(self._n_processes))
    monkeypatch.setattr(Workers, "close", lambda self: self._executor.shutdown())
    kwargs: Any = dict(SMALL, n_episodes=3, seed=0, workers=2)
    n_calls = []

    def callback(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        n_calls.append(1)
        if len(n_calls) == 5:
            REINFORCE("MlpPolicy", partial(RandomLengthEnv, 9), **kwargs).learn(30)
        return True

    REINFORCE("MlpPolicy", partial(RandomLengthEnv, 9), **kwargs).learn(60, callback=callback)
    assert len(n_calls) >= 60


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "2", [], np.float64(2)])
def test_workers_must_be_a_number_or_an_executor(workers: Any):
    with pytest.raises(ValueError, match=r"workers must be an integer of at least 1, or None, got workers="):
        REINFORCE("MlpPolicy", "CartPole-v1", workers=workers, **SMALL)


def test_numbers_of_numpy_are_numbers(monkeypatch: pytest.MonkeyPatch):
    start_again(monkeypatch, FakeExecutor(2, runner(lambda number: 5)))
    workers: Any = np.int64(2)
    attach_workers(workers, wrap_env("CartPole-v1"))
    assert len(batch(Workers(workers), n_episodes=3)) == 3


class Maker:
    """A class whose instances make environments."""

    def __call__(self) -> gym.Env:
        return RandomLengthEnv(9)


ACCEPTED: dict[str, Any] = {
    "id": "CartPole-v1",
    "spec": gym.spec("CartPole-v1"),
    "function": lambda: RandomLengthEnv(9),
    "class": Maker,
    "callable": Maker(),
    "factory": EnvFactory("CartPole-v1"),
}
REFUSED: dict[str, Callable[[], Any]] = {
    "environment": lambda: gym.make("CartPole-v1"),
    "monitored": lambda: Monitor(gym.make("CartPole-v1")),
    "dummy_vec_env": lambda: make_vec_env("CartPole-v1", 1),
    "subproc_vec_env": lambda: subproc([lambda: gym.make("CartPole-v1")]),
    "vec_normalize": lambda: VecNormalize(make_vec_env("CartPole-v1", 1)),
    "normalized": lambda: VecNormalize(wrap_env("CartPole-v1")),
}


@pytest.mark.parametrize("env", [pytest.param(env, id=name) for name, env in ACCEPTED.items() if name != "class"])
def test_workers_make_environments(env: Any):
    with ThreadPoolExecutor(1) as executor:
        REINFORCE("MlpPolicy", env, workers=executor, n_episodes=1, **SMALL).learn(1)


@pytest.mark.parametrize("name", REFUSED)
def test_what_workers_cannot_make_is_refused(name: str):
    env = REFUSED[name]()
    expected = r"workers=2 cannot have the environment that was given.* id, an EnvSpec, or a function .*normalize_observations"
    with pytest.raises(ValueError, match=expected):
        REINFORCE("MlpPolicy", env, workers=2, **SMALL)
    model = REINFORCE("MlpPolicy", "CartPole-v1", workers=2, **SMALL)
    before = model.env
    with pytest.raises(ValueError, match=expected):
        model.set_env(env)
    assert model.env is before
    env.close()


def test_without_workers_everything_is_accepted():
    for name in ("environment", "dummy_vec_env"):
        attach_workers(None, wrap_env(REFUSED[name]()))


class ConstantReward(VecEnvWrapper):
    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, *rest = self.venv.step_wait()
        return observations, np.full_like(rewards, 7), *rest


@pytest.mark.parametrize("wrap", [lambda env: VecFrameStack(env, 2), ConstantReward])
def test_a_wrapper_that_workers_do_not_make_is_refused(wrap: Callable[[VecEnv], VecEnv]):
    with pytest.raises(ValueError, match="cannot have the environment"):
        attach_workers(2, wrap(wrap_env("CartPole-v1")))


def test_a_function_that_makes_several_environments_is_refused():
    with pytest.raises(ValueError, match="cannot have the environment"):
        attach_workers(2, wrap_env(lambda: make_vec_env("CartPole-v1", 2)))


def test_a_function_that_makes_a_vec_env_of_one():
    with ThreadPoolExecutor(1) as executor:
        model = REINFORCE("MlpPolicy", lambda: make_vec_env("CartPole-v1", 1), workers=executor, seed=0, **SMALL).learn(50)
    other = REINFORCE("MlpPolicy", "CartPole-v1", seed=0, **SMALL).learn(50)
    for name, value in model.policy.state_dict().items():
        assert th.equal(value, other.policy.state_dict()[name])


@pytest.mark.parametrize(
    "extra, start",
    [
        ("workers", lambda: Workers(2)),
        ("ray", lambda: RayExecutor(2)),
        ("envpool", lambda: EnvPoolVecEnv("CartPole-v1", 2)),
    ],
)
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, extra: str, start: Callable[[], Any]):
    for name in ("loky", "ray", "envpool"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"pip install 'sb3-reinforce\[{extra}\]'"):
        start()


def test_a_model_is_made_without_loky(monkeypatch: pytest.MonkeyPatch):
    """It may be loaded to predict only."""
    monkeypatch.setitem(sys.modules, "loky", None)
    model = REINFORCE("MlpPolicy", "CartPole-v1", workers=2, **SMALL)
    model.predict(np.zeros(4))
    with pytest.raises(ImportError, match=r"sb3-reinforce\[workers\]"):
        model.learn(1)
    assert model.num_timesteps == 0


# Environments with monitor files ---------------------------------------------------------------------------------------------


def wrappers_of(env: Any) -> list[type]:
    names = []
    while isinstance(env, gym.Wrapper):
        names.append(type(env))
        env = env.env
    return [*names, type(env)]


def test_a_factory_makes_what_make_vec_env_makes(tmp_path: Path):
    env_kwargs: dict[str, Any] = dict(max_episode_steps=7)
    wrapper_kwargs = dict(func=lambda reward: 2 * reward)
    monitor_kwargs: dict[str, Any] = dict(info_keywords=("key",))
    make = EnvFactory("CartPole-v1", env_kwargs, TransformReward, wrapper_kwargs, str(tmp_path), monitor_kwargs)
    env: Any = make()
    vec_env = make_vec_env(
        "CartPole-v1",
        1,
        env_kwargs=env_kwargs,
        wrapper_class=TransformReward,
        wrapper_kwargs=wrapper_kwargs,
        monitor_dir=str(tmp_path / "other"),
        monitor_kwargs=monitor_kwargs,
    )
    assert isinstance(vec_env, DummyVecEnv)
    assert wrappers_of(env) == wrappers_of(vec_env.envs[0])
    assert env.get_wrapper_attr("info_keywords") == ("key",)
    env.reset(seed=0)
    assert env.step(0)[1] == 2.0
    assert env.get_wrapper_attr("_max_episode_steps") == 7
    env.close()


def test_a_factory_takes_a_spec_and_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    env = EnvFactory(gym.spec("CartPole-v1"))()
    # RL Zoo has a time limit of its own
    assert wrappers_of(env)[0] is Monitor and env.get_wrapper_attr("_max_episode_steps") == 500
    env.reset()
    while not any(env.step(0)[2:4]):
        pass
    assert not list(tmp_path.iterdir())


def test_monitor_files_are_read_together(tmp_path: Path):
    """One for each environment that is made, and that of this process, which has no episodes, does no harm."""
    make = EnvFactory("CartPole-v1", monitor_dir=str(tmp_path))
    model = REINFORCE("MlpPolicy", make, workers=None, **SMALL)
    job, _ = job_of(make, **SMALL)
    episodes = [episode for name in "ab" for episode in run_episodes(name, replace(job, env_name=name).pack(), 0, 4)]
    vars(jobs._LATEST).clear()
    assert model.env is not None
    model.env.close()
    assert len(list(tmp_path.glob("*.monitor.csv"))) == 4
    results = load_results(str(tmp_path))
    assert sorted(results["l"]) == sorted(episode.n_steps for episode in episodes)
    assert sorted(results["r"]) == sorted(episode.rewards.sum() for episode in episodes)


# Ray -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def test_ray_runs_functions_in_actors_that_have_least_to_do(ray: FakeRay):
    executor = RayExecutor(3, num_gpus=0.5)
    assert ray.options == [dict(num_cpus=1, max_restarts=-1, max_task_retries=2, num_gpus=0.5)] * 3
    assert Workers(executor).count() == 3
    futures = [executor.submit(divmod, number, 3) for number in range(7)]
    assert sorted(len(actor.calls) for actor in ray.actors) == [2, 2, 3]
    assert not any(future.done() for future in futures)
    ray.run_all()
    assert [future.result() for future in futures] == [divmod(number, 3) for number in range(7)]
    # All of them have nothing to do again
    for _ in range(3):
        executor.submit(abs, -1)
    assert [len(actor.calls) for actor in ray.actors] == [1, 1, 1]


def test_ray_has_keyword_arguments_and_errors(ray: FakeRay):
    executor = RayExecutor(1)
    futures = [executor.submit(int, "11", base=2), executor.submit(int, "x")]
    ray.run_all()
    assert futures[0].result() == 3
    with pytest.raises(ValueError, match="invalid literal"):
        futures[1].result()


def test_ray_s_actors_end_with_the_executor(ray: FakeRay):
    with RayExecutor(2) as executor:
        executor.submit(abs, -1)
        ray.run_all()
    assert ray.killed == ray.actors
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(abs, -1)
    with pytest.raises(RuntimeError, match="takes no more tasks"):
        batch(Workers(executor), n_episodes=1)
    executor.shutdown()


def test_ray_takes_no_tasks_after_a_shutdown_that_has_interrupted_some(ray: FakeRay):
    executor = RayExecutor(1)
    future = executor.submit(abs, -1)
    executor.shutdown(wait=False)
    # Later, as it is in Ray
    ray.run_all()
    assert future.exception() is not None
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, -1)


def test_a_batch_on_ray(ray: FakeRay, monkeypatch: pytest.MonkeyPatch):
    executor = RayExecutor(2)
    monkeypatch.setattr(Future, "result", lambda self, timeout=None, result=Future.result: (ray.run_all(), result(self, 0))[1])
    job, _ = job_of(partial(RandomLengthEnv, 9), **SMALL)
    episodes = list(Workers(executor).episodes(job, EpisodeSchedule(1, 0, 6, seed=3)))
    assert_same(episodes, run_episodes("a", job.pack(), 0, 6))
