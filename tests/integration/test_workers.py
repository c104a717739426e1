"""Training on workers is training in this process, bit for bit, whatever they are and whatever happens to them."""

import logging
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback, EvalCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn

from sb3_reinforce import REINFORCE, MlpPolicy
from sb3_reinforce.episodes.schedule import episode_seed
from sb3_reinforce.episodes.vec_env import wrap_env
from sb3_reinforce.episodes.workers import EnvFactory
from sb3_reinforce.tools.checkpoints import AtomicCheckpointCallback, newest_checkpoint
from sb3_reinforce.tools.ray import RayExecutor
from tests.envs import RandomEnv, RandomLengthEnv
from tests.integration.common import CHOICE, GRAY_IMAGE, PAIR, VECTOR, assert_same, assert_same_parameters

loky = pytest.importorskip("loky")
psutil = pytest.importorskip("psutil")

ROOT = Path(__file__).parent.parent.parent
SEED = 3
#: Makes the usual environment
MAKE = partial(RandomLengthEnv, 9)
DICT = spaces.Dict(vector=VECTOR, choice=spaces.Discrete(3))


class Dropout(BaseFeaturesExtractor):
    """Flat observations, with dropout."""

    def __init__(self, observation_space: spaces.Box):
        super().__init__(observation_space, features_dim=16)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)


class OwnForward(MlpPolicy):
    """Samples its actions itself, from PyTorch's generator."""

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        return super().forward(obs, deterministic)


#: Arguments of REINFORCE, with ``env`` and ``policy`` if they are not the usual ones, and steps that are at least 20 batches
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "n_episodes": dict(n_episodes=3),
    "n_steps": dict(n_steps=12),
    "raw_observations": dict(n_episodes=3, normalize_observations=False),
    "discrete": dict(n_episodes=3, env=partial(RandomLengthEnv, 9, CHOICE)),
    "gsde": dict(n_episodes=3, use_sde=True, sde_sample_freq=3),
    "dropout": dict(n_steps=12, policy_kwargs=dict(features_extractor_class=Dropout)),
    "q": dict(n_episodes=3, advantage="q"),
    "time_limit": dict(n_steps=12, max_episode_steps=4, bootstrap_timeouts=True),
    "random_time_limits": dict(n_episodes=3, env=partial(RandomEnv, VECTOR, spaces.MultiDiscrete([2, 3]), 9)),
    "optimizer": dict(n_episodes=3, target_kl=None, learning_rate=1e-2),
    "policy_of_sb3": dict(n_episodes=3, policy=ActorCriticPolicy),
    "own_forward": dict(n_episodes=3, policy=OwnForward),
    "dictionary": dict(n_episodes=3, policy="MultiInputPolicy", env=partial(RandomEnv, DICT, PAIR, 9)),
    "images": dict(
        n_episodes=2,
        policy="CnnPolicy",
        env=partial(RandomEnv, GRAY_IMAGE, CHOICE, 4),
        policy_kwargs=dict(features_extractor_kwargs=dict(features_dim=16)),
        n_timesteps=110,
    ),
}
every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)
#: Those that need not wait for ``make slow``
QUICK = ("n_steps", "gsde", "own_forward", "dictionary")


class Journal(KVWriter):
    """Keeps what is logged, except what depends on the clock."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        # The representation of a NaN equals that of another
        self.rows.append((step, {key: repr(value) for key, value in key_values.items() if not key.startswith("time/")}))

    def close(self) -> None:
        pass


def make_model(workers: Any, policy: Any = "MlpPolicy", env: Any = MAKE, **kwargs: Any) -> REINFORCE:
    return REINFORCE(policy, env, **(dict(seed=SEED, workers=workers) | kwargs))


def follow(model: REINFORCE) -> Journal:
    """Log to a journal."""
    journal = Journal()
    model.set_logger(Logger(None, [journal]))
    return journal


def summary(model: REINFORCE, journal: Journal | None = None) -> dict[str, Any]:
    """All that a run leaves behind but the time it has taken."""
    assert model.ep_info_buffer is not None
    return dict(
        parameters=deepcopy(dict(model.get_parameters())),
        counters=[model.num_timesteps, model._n_updates, model._next_episode, model._n_iterations, model._episode_num],
        episodes=[(info["r"], info["l"]) for info in model.ep_info_buffer],
        logged=journal.rows if journal is not None else [],
    )


def train(
    workers: Any, n_timesteps: int = 400, callback: Any = None, progress_bar: bool = False, **kwargs: Any
) -> tuple[REINFORCE, dict[str, Any]]:
    model = make_model(workers, **kwargs)
    journal = follow(model)
    model.learn(n_timesteps, callback=callback, progress_bar=progress_bar)
    return model, summary(model, journal)


@cache
def reference(name: str) -> dict[str, Any]:
    """The run of a configuration in this process."""
    model, result = train(None, **CONFIGURATIONS[name])
    assert model._n_updates >= 20
    assert len(result["logged"]) == model._n_updates
    return result


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    """Two processes of loky, which none of these tests may stop."""
    with loky.ProcessPoolExecutor(max_workers=2) as executor:
        yield executor


@pytest.fixture(scope="module")
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(3) as executor:
        yield executor


@pytest.fixture(scope="module")
def spawned() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture(scope="module")
def dask() -> Iterator[Executor]:
    distributed = pytest.importorskip("distributed")
    options = dict(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.CRITICAL)
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        yield client.get_executor(pure=False)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray on this machine."""
    ray = pytest.importorskip("ray")
    # Its workers import the tests as this process does
    environment = dict(env_vars=dict(PYTHONPATH=os.pathsep.join(filter(None, sys.path))))
    # Two actors for all tests, and two for one that kills them
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def actors(ray: Any) -> Iterator[Executor]:
    executor = RayExecutor(2)
    yield executor
    executor.shutdown(wait=False)


def processes() -> dict[int, str]:
    """The processes that this one has started, and those that they have, without those that clean up after all of them."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
            if "resource_tracker" not in command and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = command
        except psutil.Error:
            continue
    return found


@contextmanager
def no_process_left(n_seconds: float = 10.0) -> Iterator[None]:
    """What is started in here has ended some seconds later at most."""
    before = processes()
    yield
    deadline = time.monotonic() + n_seconds
    while (left := processes().keys() - before.keys()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, [processes().get(pid) for pid in left]


# The same bits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGURATIONS]
)
def test_two_processes_train_as_this_one(pool: Executor, name: str):
    assert_same(train(pool, **CONFIGURATIONS[name])[1], reference(name))


@pytest.mark.parametrize(
    "workers, name",
    [
        (2, "n_steps"),
        *(
            pytest.param(workers, name, marks=pytest.mark.slow)
            for workers, name in ((1, "n_steps"), (3, "n_steps"), (1, "n_episodes"), (2, "n_episodes"), (3, "n_episodes"))
        ),
    ],
)
def test_any_number_of_workers_trains_as_this_process(workers: int, name: str):
    with no_process_left():
        assert_same(train(workers, **CONFIGURATIONS[name])[1], reference(name))


@pytest.mark.parametrize("name", ["n_steps", pytest.param("dictionary", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["threads", "spawned", "dask"])
def test_any_executor_trains_as_this_process(request: pytest.FixtureRequest, kind: str, name: str):
    assert_same(train(request.getfixturevalue(kind), **CONFIGURATIONS[name])[1], reference(name))


@pytest.mark.slow
@every_configuration
@pytest.mark.parametrize("kind", ["threads", "spawned", "dask", "actors", "three"])
def test_all_configurations_on_all_executors(request: pytest.FixtureRequest, kind: str, name: str):
    workers = 3 if kind == "three" else request.getfixturevalue(kind)
    assert_same(train(workers, **CONFIGURATIONS[name])[1], reference(name))


def test_threads_do_not_share_pytorch_s_generator(threads: Executor):
    """Nor do those of Dask's workers, which have one for each core by default."""
    kwargs: Any = dict(env=partial(RandomLengthEnv, 60), policy=OwnForward, n_episodes=12, n_timesteps=1500)
    assert_same(train(threads, **kwargs)[1], train(None, **kwargs)[1])


class Delayed(RandomLengthEnv):
    """Steps take random times, which are not seeded."""

    def step(self, action: Any) -> Any:
        time.sleep(random.SystemRandom().expovariate(2000))
        return super().step(action)


@pytest.mark.parametrize("name", ["n_steps", "n_episodes"])
@pytest.mark.parametrize("kind", ["threads", "pool"])
def test_it_does_not_matter_who_is_late(request: pytest.FixtureRequest, kind: str, name: str):
    kwargs = CONFIGURATIONS[name] | dict(env=partial(Delayed, 9))
    assert_same(train(request.getfixturevalue(kind), **kwargs)[1], reference(name))


class Mortal(RandomLengthEnv):
    """
    Kills its process in the middle of some episodes, the first time that they run.

    :param folder: for a file for each of these deaths
    :param home: the process that lives on
    :param seeds: of these episodes
    """

    def __init__(self, folder: Path, home: int, seeds: list[int]):
        super().__init__(9)
        self.folder = folder
        self.home = home
        self.fatal = seeds

    def step(self, action: Any) -> Any:
        marker = self.folder / str(self.seeds[-1])
        if self.seeds[-1] in self.fatal and os.getpid() != self.home and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


@pytest.mark.skipif(os.name != "posix", reason="There is no SIGKILL")
@pytest.mark.parametrize("numbers", [[40], pytest.param(list(range(1, 60, 3)), marks=pytest.mark.slow, id="in_every_batch")])
def test_a_worker_that_is_killed_costs_time_alone(tmp_path: Path, numbers: list[int]):
    seeds = [episode_seed(SEED, number) for number in numbers]
    with no_process_left():
        result = train(2, env=partial(Mortal, tmp_path, os.getpid(), seeds), n_episodes=3)[1]
    assert len(list(tmp_path.iterdir())) == len(numbers)
    assert_same(result, reference("n_episodes"))


@pytest.mark.slow
def test_an_actor_that_dies_costs_time_alone(tmp_path: Path, ray: Any):
    seeds = [episode_seed(SEED, number) for number in (4, 20, 40)]
    with RayExecutor(2) as executor:
        result = train(executor, env=partial(Mortal, tmp_path, os.getpid(), seeds), n_episodes=3)[1]
    assert len(list(tmp_path.iterdir())) == 3
    assert_same(result, reference("n_episodes"))


@pytest.mark.slow
def test_actors_end_after_something_was_cancelled(ray: Any):
    """As a batch does with what it does not need any more."""
    executor = RayExecutor(1)
    assert executor.submit(abs, -1).result(60) == 1
    assert executor.submit(time.sleep, 0.5).cancel()
    thread = threading.Thread(target=executor.shutdown, daemon=True)
    thread.start()
    thread.join(10)
    is_over = not thread.is_alive()
    executor.shutdown(wait=False)
    assert is_over


class Killer(BaseCallback):
    """Sends a signal to a process that this one has started a moment after the beginning of each rollout."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.others = processes().keys()
        self.n_killed = 0

    def _on_rollout_start(self) -> None:
        # The first ones are still to be started
        threading.Timer(random.SystemRandom().uniform(0.0, 0.1), self.kill).start()

    def kill(self) -> None:
        workers = sorted(processes().keys() - self.others)
        # Not before they have had the time to import what they need, and to ignore Ctrl-C
        if workers and (self.number == signal.SIGKILL or self.model._n_updates):
            os.kill(random.SystemRandom().choice(workers), self.number)
            self.n_killed += 1

    def _on_step(self) -> bool:
        return True


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="There is no SIGKILL")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["sigkill", "sigint"])
def test_workers_may_be_killed_in_every_batch(number: int):
    """From outside, at any moment. Ctrl-C means nothing to them."""
    kwargs: Any = dict(env=partial(Delayed, 9), n_episodes=40, n_timesteps=2000)
    killer = Killer(number)
    with no_process_left():
        result = train(2, callback=killer, **kwargs)[1]
    assert killer.n_killed >= 5
    assert_same(result, train(None, **kwargs)[1])


@pytest.mark.slow
def test_processes_are_not_those_of_others():
    """loky has an executor for everyone: whoever uses it as well keeps it."""
    executor = loky.get_reusable_executor(max_workers=1)
    pid = executor.submit(os.getpid).result()
    train(2, n_episodes=3, n_timesteps=60)
    assert loky.get_reusable_executor(max_workers=1) is executor
    assert executor.submit(os.getpid).result() == pid
    executor.shutdown(kill_workers=True)


def test_without_a_seed_it_runs(pool: Executor):
    model, result = train(pool, seed=None, n_episodes=3, n_timesteps=100)
    assert model.seed is None and model._n_updates >= 5
    assert [steps for _, steps in result["episodes"]]


def test_without_a_seed_the_noise_is_that_of_the_run_seed(pool: Executor):
    """Where observations are always the same, so are the actions of the first batch."""
    kwargs: Any = dict(env=partial(RandomEnv, spaces.Box(0, 0, (3,)), PAIR, 1), n_episodes=20, n_timesteps=1)
    actions = []
    for workers in (pool, None):
        np.random.seed(0)
        model = train(workers, seed=None, **kwargs)[0]
        assert model.run_seed != SEED
        actions.append(model.rollout_buffer.actions.copy())
    assert actions[0].shape == (20, 2)
    np.testing.assert_array_equal(*actions)


# Stopping and going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["n_steps", "gsde"])
def test_a_run_goes_on_exactly_on_any_workers(tmp_path: Path, pool: Executor, threads: Executor, name: str):
    kwargs = CONFIGURATIONS[name]
    half = make_model(pool, **kwargs)
    journal = follow(half)
    half.learn(200).save(tmp_path / "model")
    for workers in (None, pool, threads):
        resumed = REINFORCE.load(tmp_path / "model", env=MAKE, workers=workers)
        rest = follow(resumed)
        resumed.learn(400 - half.num_timesteps, reset_num_timesteps=False)
        rest.rows[:0] = journal.rows
        assert_same(summary(resumed, rest), reference(name))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [None, 1, 3])
def test_a_run_of_two_workers_goes_on_exactly_on_others(tmp_path: Path, workers: int | None):
    half = make_model(2, n_steps=12).learn(200)
    half.save(tmp_path / "model")
    resumed = REINFORCE.load(tmp_path / "model", env=MAKE, workers=workers)
    resumed.learn(400 - half.num_timesteps, reset_num_timesteps=False)
    result = summary(resumed)
    assert_same(result | dict(logged=reference("n_steps")["logged"]), reference("n_steps"))


def test_workers_are_not_part_of_a_file(tmp_path: Path, pool: Executor):
    make_model(pool).save(tmp_path / "model")
    assert REINFORCE.load(tmp_path / "model").workers is None
    assert REINFORCE.load(tmp_path / "model", env=MAKE, workers=2).workers == 2
    for env, workers in ((RandomLengthEnv(9), 2), (MAKE, 0)):
        with pytest.raises(ValueError, match="workers"):
            REINFORCE.load(tmp_path / "model", env=env, workers=workers)


def test_learning_goes_on_from_call_to_call(pool: Executor):
    model = make_model(pool, n_steps=12)
    journal = follow(model)
    while model.num_timesteps < 400:
        model.learn(min(70, 400 - model.num_timesteps), reset_num_timesteps=False)
    assert_same(summary(model, journal), reference("n_steps"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_learning_twice_with_processes_of_its_own(workers: int):
    with no_process_left():
        model = make_model(workers, n_episodes=3)
        assert not model._running_workers
        for _ in range(2):
            with no_process_left():
                model.learn(60)
            assert not model._running_workers
    other = make_model(None, n_episodes=3).learn(60).learn(60)
    assert_same_parameters(model, other)


def test_workers_may_change_between_calls(pool: Executor, threads: Executor):
    model = make_model(None, n_steps=12)
    journal = follow(model)
    for n_timesteps, workers in ((100, pool), (200, None), (300, threads), (400, pool)):
        model.workers = workers
        model.learn(n_timesteps - model.num_timesteps, reset_num_timesteps=False)
    assert_same(summary(model, journal), reference("n_steps"))


def test_another_environment_between_calls(pool: Executor):
    results = []
    for workers in (None, pool):
        model = make_model(workers, n_episodes=3).learn(60)
        model.set_env(partial(RandomLengthEnv, 4))
        model.learn(60, reset_num_timesteps=False)
        results.append(summary(model))
        assert max(steps for _, steps in results[-1]["episodes"][-9:]) <= 4
    assert_same(*results)


class Exchange(BaseCallback):
    """Sets an environment of shorter episodes after the second update."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.model._n_updates == 2:
            self.model.set_env(partial(RandomLengthEnv, 4))


@pytest.mark.parametrize("kind", ["threads", "pool", "dask"])
def test_another_environment_within_a_call(request: pytest.FixtureRequest, kind: str):
    """From the next batch on."""
    results = []
    for workers in (None, request.getfixturevalue(kind)):
        results.append(train(workers, callback=Exchange(), n_episodes=3, n_timesteps=100)[1])
        lengths = [steps for _, steps in results[-1]["episodes"]]
        assert max(lengths[:9]) > 4 >= max(lengths[9:])
    assert_same(*results)


def test_what_would_not_reach_the_environments_of_workers_is_refused(threads: Executor):
    model = make_model(threads, n_episodes=3)
    env = model.get_env()
    assert env is not None
    for name, args in (("set_attr", ("n_steps", 4)), ("env_method", ("close",)), ("set_options", (dict(level=2),))):
        with pytest.raises(RuntimeError, match=rf"^{name}\(\) would change nothing: .*model.set_env\(\) a function"):
            getattr(env, name)(*args)
    assert env.get_attr("seeds") is not None
    # The refusals leave nothing behind
    assert_same(summary(model.learn(60)), summary(make_model(None, n_episodes=3).learn(60)))
    model.workers = None
    model.learn(30, reset_num_timesteps=False)
    env.set_attr("level", 2)
    assert env.get_attr("level") == [2]


@pytest.mark.parametrize("workers", [2, "threads"])
@pytest.mark.parametrize("kind", ["around_wrap_env", "several"])
def test_what_workers_cannot_make_is_refused(request: pytest.FixtureRequest, workers: Any, kind: str):
    """By the constructor, ``set_env()`` and ``learn()``."""
    env = VecNormalize(wrap_env(MAKE)) if kind == "around_wrap_env" else partial(several_envs, 2)
    workers = workers if workers == 2 else request.getfixturevalue(workers)
    model = make_model(None, env=env, n_episodes=3, normalize_observations=False)
    model.workers = workers
    other = make_model(workers)
    for refuse in (lambda: make_model(workers, env=env), lambda: other.set_env(env), lambda: model.learn(10)):
        with pytest.raises(ValueError, match=r"workers=.* cannot have the environment that was given .*each makes its own"):
            refuse()
    assert model.num_timesteps == 0


def several_envs(n_envs: int) -> VecEnv:
    return DummyVecEnv([MAKE] * n_envs)


# Callbacks -------------------------------------------------------------------------------------------------------------------

#: Local variables of each step
NAMES = ["obs", "actions", "clipped_actions", "rewards", "dones", "infos", "n_steps", "active"]


class Steps(BaseCallback):
    """Keeps the local variables of each step, and what the model counts then."""

    def __init__(self, n_steps: int | None = None) -> None:
        super().__init__()
        self.n_steps = n_steps
        self.steps: list[dict[str, Any]] = []
        self.names: list[set[str]] = []

    def _on_step(self) -> bool:
        step = {name: deepcopy(self.locals[name]) for name in NAMES}
        for info in step["infos"]:
            info.get("episode", {}).pop("t", None)
        assert self.locals["env"] is self.training_env
        step.update(counted=(self.num_timesteps, self.n_calls), new_obs=deepcopy(self.locals["new_obs"]))
        self.steps.append(step)
        self.names.append(set(self.locals))
        return len(self.steps) != self.n_steps


@pytest.mark.parametrize("name", ["n_steps", "time_limit", "dictionary", pytest.param("images", marks=pytest.mark.slow)])
def test_callbacks_see_each_step_once_and_in_order(pool: Executor, name: str):
    """With what a rollout in this process tells them; after the last step of an episode, that comes again."""
    seen = [Steps(), Steps()]
    for workers, steps in zip((None, pool), seen, strict=True):
        model, _ = train(workers, **CONFIGURATIONS[name], callback=steps)
        assert len(steps.steps) == model.num_timesteps
    for mine, other in zip(*(steps.steps for steps in seen), strict=True):
        assert [list(info) for info in mine["infos"]] == [list(info) for info in other["infos"]]
        here, there = (step.pop("new_obs") for step in (mine, other))
        assert_same_arrays(mine, other)
        assert_same_arrays(there, mine["obs"] if mine["dones"][0] else here)


def assert_same_arrays(one: Any, other: Any) -> None:
    """Nestings of dictionaries, lists and arrays are the same, bit for bit."""
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same_arrays(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_same_arrays(a, b)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    else:
        assert one == other


def test_callbacks_find_the_rollout_buffer(threads: Executor):
    steps = Steps()
    train(threads, callback=steps, n_episodes=3, n_timesteps=30)
    assert all({"rollout_buffer", "model"} <= names for names in steps.names)


def test_an_evaluation_is_the_same(pool: Executor, tmp_path: Path):
    results = []
    for workers, name in ((None, "here"), (pool, "there")):
        env = Monitor(RandomLengthEnv(9))
        env.reset(seed=0)
        callback = EvalCallback(env, log_path=str(tmp_path / name), eval_freq=50, n_eval_episodes=3, verbose=0)
        _, result = train(workers, callback=callback, n_episodes=3)
        evaluations = np.load(tmp_path / name / "evaluations.npz")
        results.append((result, {key: evaluations[key].tolist() for key in evaluations.files}))
        assert len(results[-1][1]["timesteps"]) == result["counters"][0] // 50
    assert_same(*results)


def test_training_stops_after_so_many_episodes(pool: Executor):
    results = []
    for workers in (None, pool):
        callback = StopTrainingOnMaxEpisodes(max_episodes=8)
        results.append(train(workers, callback=callback, n_episodes=5)[1])
        assert callback.n_episodes == 8
    # The end of the last one is not waited for
    assert len(results[0]["episodes"]) == 7
    assert_same(*results)


def test_a_run_that_is_stopped_in_the_middle_of_a_batch_goes_on_exactly(pool: Executor, tmp_path: Path):
    results = []
    for workers in (None, pool):
        model, result = train(workers, callback=Steps(97), n_steps=12)
        model.save(tmp_path / "model")
        resumed = REINFORCE.load(tmp_path / "model", env=MAKE, workers=pool)
        assert resumed.num_timesteps < model.num_timesteps == 97
        resumed.learn(400 - resumed.num_timesteps, reset_num_timesteps=False)
        assert_same(summary(resumed) | dict(logged=None), reference("n_steps") | dict(logged=None))
        results.append(result)
    assert_same(*results)


def test_checkpoints_of_a_run_go_on_exactly(pool: Executor, tmp_path: Path):
    checkpoints = AtomicCheckpointCallback(tmp_path, every_n_updates=7, keep=100)
    assert_same(train(pool, callback=checkpoints, **CONFIGURATIONS["n_steps"])[1], reference("n_steps"))
    paths = sorted(tmp_path.glob("*.zip"), key=lambda path: path.stat().st_mtime)
    assert len(paths) >= 3
    for path, workers in zip(paths, (None, pool, None), strict=False):
        resumed = REINFORCE.load(path, env=MAKE, workers=workers)
        resumed.learn(400 - resumed.num_timesteps, reset_num_timesteps=False)
        assert_same(summary(resumed) | dict(logged=None), reference("n_steps") | dict(logged=None))


def test_a_progress_bar_shows_all_steps(pool: Executor, capsys: pytest.CaptureFixture):
    pytest.importorskip("tqdm")
    pytest.importorskip("rich")
    model, result = train(pool, progress_bar=True, n_steps=12)
    assert_same(result, reference("n_steps"))
    printed = "".join(capsys.readouterr())
    assert f"{model.num_timesteps:,}/400" in printed


def test_what_was_thrown_away_is_logged(pool: Executor):
    values: list[int] = []
    note = ConvertCallback(lambda locals_, globals_: True)
    note._on_rollout_end = lambda: values.append(model.logger.name_to_value["time/discarded_steps"])  # type: ignore[method-assign]
    model = make_model(pool, n_steps=12)
    model.learn(400, callback=note)
    assert values == sorted(values)
    model = make_model(pool, n_episodes=3)
    values.clear()
    model.learn(100, callback=note)
    assert set(values) == {0}


def test_monitor_files_of_workers_are_read_together(pool: Executor, tmp_path: Path):
    """Times and order aside, the episodes of the run are all in them."""
    model, result = train(pool, env=EnvFactory("CartPole-v1", monitor_dir=str(tmp_path)), n_episodes=4, n_timesteps=500)
    results = load_results(str(tmp_path))
    assert sorted(zip(results["r"], results["l"], strict=True)) == sorted(result["episodes"])
    # One is that of this process
    assert 2 <= len(list(tmp_path.glob("*.monitor.csv"))) <= 3


# What goes wrong -------------------------------------------------------------------------------------------------------------


class Faulty(RandomLengthEnv):
    """
    Fails at the last step of an episode, or in the reset, with some seed.

    :param kind: what happens then
    :param seed: of that episode
    :param home: the process in which nothing happens
    """

    def __init__(self, kind: str, seed: int, home: int | None = None):
        super().__init__(9)
        self.kind = kind
        self.bad_seed = seed
        self.home = home

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        if self.kind == "reset" and seed == self.bad_seed:
            raise ZeroDivisionError("There is no such level")
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        step = super().step(action)
        if step[2] and self.seeds[-1] == self.bad_seed and os.getpid() != self.home:
            if self.kind == "raise":
                raise ZeroDivisionError("The ball is not round")
            if self.kind == "sys_exit":
                sys.exit("The ball is gone")
            if self.kind == "exit":
                os._exit(7)
            if self.kind == "hang":
                time.sleep(1000)
        return step


def causes(error: BaseException | None) -> str:
    """What a traceback of an error shows of its causes."""
    texts = []
    while error is not None:
        texts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__
    return "\n".join(texts)


@pytest.mark.parametrize("number", [0, 10])
@pytest.mark.parametrize("kind", ["threads", "pool", "dask", pytest.param("actors", marks=pytest.mark.slow)])
def test_what_an_environment_raises_can_be_seen_again(request: pytest.FixtureRequest, kind: str, number: int):
    """The message has the number of the episode, and the seed with which it begins; the model is as it was."""
    seed = episode_seed(SEED, number)
    make = partial(Faulty, "raise", seed)
    model = make_model(request.getfixturevalue(kind), env=make, n_episodes=4)
    with pytest.raises(
        RuntimeError, match=rf"ZeroDivisionError in step\(\) .*episode {number}\b.*ball is not round"
    ) as caught:
        model.learn(400)
    assert caught.value.args
    assert model._n_updates == number // 4
    # Those before it are not lost
    assert model.ep_info_buffer is not None
    assert len(model.ep_info_buffer) == number
    told = re.search(r"reset\(seed=(\d+)\)", str(caught.value))
    assert told is not None
    if kind == "pool":
        assert re.search(r'File ".*test_workers.py", line \d+, in step', causes(caught.value))
    # By hand
    env = make()
    env.reset(seed=int(told[1]))
    with pytest.raises(ZeroDivisionError, match="ball is not round"):
        while not any(env.step(env.action_space.sample())[2:4]):
            pass
    # The same words as in this process
    with pytest.raises(RuntimeError) as here:
        make_model(None, env=make, n_episodes=4).learn(400)
    assert str(here.value) in str(caught.value)
    other = make_model(None, n_episodes=4)
    while other._n_updates < model._n_updates:
        other.learn(1, reset_num_timesteps=False)
    assert_same_parameters(model, other)


@pytest.mark.parametrize("number", [0, 10])
@pytest.mark.parametrize("kind", ["threads", "pool", "dask", pytest.param("actors", marks=pytest.mark.slow)])
def test_an_environment_that_exits(request: pytest.FixtureRequest, kind: str, number: int):
    """``sys.exit()`` ends neither this process nor a worker."""
    workers = request.getfixturevalue(kind)
    model = make_model(workers, env=partial(Faulty, "sys_exit", episode_seed(SEED, number)), n_episodes=4)
    with pytest.raises(RuntimeError, match=rf"episode {number}\b.*SystemExit: The ball is gone"):
        model.learn(400)
    assert model.ep_info_buffer is not None
    assert len(model.ep_info_buffer) == number
    assert_same(train(workers, n_steps=12)[1], reference("n_steps"))


def make_here(home: int, thread: int) -> gym.Env:
    if (os.getpid(), threading.get_ident()) != (home, thread):
        raise FileNotFoundError("There is no track.xml")
    return RandomLengthEnv(9)


@pytest.mark.parametrize("kind", ["threads", "pool", "dask", pytest.param("actors", marks=pytest.mark.slow)])
def test_an_environment_that_cannot_be_made_in_a_worker(request: pytest.FixtureRequest, kind: str):
    workers = request.getfixturevalue(kind)
    model = make_model(workers, env=partial(make_here, os.getpid(), threading.get_ident()))
    with pytest.raises(RuntimeError, match=r"episode 0\b.*FileNotFoundError: There is no track.xml"):
        model.learn(10)
    assert_same(train(workers, n_steps=12)[1], reference("n_steps"))


@pytest.mark.parametrize("kind", ["exits", "cannot_be_made"])
def test_what_else_goes_wrong_is_told_with_the_seed(threads: Executor, kind: str):
    seed = episode_seed(SEED, 0)
    make = partial(Faulty, "sys_exit", seed) if kind == "exits" else partial(make_here, os.getpid(), threading.get_ident())
    with pytest.raises(RuntimeError, match=rf"episode 0 \(reset\(seed={seed}\)\)"):
        make_model(threads, env=make, n_episodes=4).learn(400)


@pytest.mark.parametrize("number", [1, 10])
def test_what_a_reset_raises_can_be_seen_again(pool: Executor, number: int):
    make = partial(Faulty, "reset", episode_seed(SEED, number))
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError in .*no such level") as caught:
        make_model(pool, env=make, n_episodes=4).learn(400)
    told = re.search(r"reset\(seed=(\d+)\)", str(caught.value))
    assert told is not None
    with pytest.raises(ZeroDivisionError, match="no such level"):
        make().reset(seed=int(told[1]))


def other_space(home: int, kind: str) -> gym.Env:
    """Of other spaces in other processes."""
    other = spaces.Box(-1, 1, (4,))
    if os.getpid() == home:
        return RandomEnv(VECTOR, PAIR, 5)
    return RandomEnv(other, PAIR, 5) if kind == "observation" else RandomEnv(VECTOR, other, 5)


@pytest.mark.parametrize("kind", ["observation", "action"])
def test_another_space_in_a_worker(pool: Executor, kind: str):
    model = make_model(pool, env=partial(other_space, os.getpid(), kind))
    with pytest.raises(ValueError, match=rf"in a worker has the {kind}_space Box\(.*that of the model is Box\(.*the same"):
        model.learn(10)
    # The workers are still there
    assert_same(train(pool, n_steps=12)[1], reference("n_steps"))


@pytest.mark.slow
def test_an_environment_that_ends_its_process():
    """Whoever runs that episode dies."""
    seed = episode_seed(SEED, 5)
    before = time.monotonic()
    with no_process_left():
        model = make_model(1, env=partial(Faulty, "exit", seed, os.getpid()), n_episodes=8)
        with pytest.raises(RuntimeError, match=r"A worker has died 3 times .*episodes \d+ to \d+ .*TerminatedWorkerError"):
            model.learn(400)
    assert model._n_updates == 0
    assert time.monotonic() - before < 120


@pytest.mark.slow
def test_an_environment_that_ends_a_process_of_an_executor_that_was_given():
    seed = episode_seed(SEED, 5)
    with no_process_left():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
            model = make_model(executor, env=partial(Faulty, "exit", seed, os.getpid()), n_episodes=8)
            with pytest.raises(RuntimeError, match=r"A worker has died .*BrokenProcessPool"):
                model.learn(400)


def test_an_episode_that_hangs(threads: Executor):
    """The time is that of an episode, not that of waiting for a worker; whoever else is to be run by it still is."""
    seed = episode_seed(SEED, 20)
    model = make_model(threads, env=partial(Faulty, "hang", seed), n_episodes=8, episode_timeout=2)
    with pytest.raises(
        RuntimeError, match=rf"episode 20 \(reset\(seed={seed}\)\) has not ended within episode_timeout=2 seconds"
    ):
        model.learn(400)
    assert model._n_updates == 2
    assert model.ep_info_buffer is not None
    assert len(model.ep_info_buffer) == 20
    assert_same(train(threads, n_steps=12)[1], reference("n_steps"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [0, 20])
def test_processes_with_an_episode_that_hangs(number: int, workers: int):
    seed = episode_seed(SEED, number)
    env = partial(Faulty, "hang", seed, os.getpid())
    before = time.monotonic()
    with no_process_left():
        model = make_model(workers, env=env, n_episodes=8, episode_timeout=3)
        with pytest.raises(RuntimeError, match=rf"episode {number} \(reset\(seed={seed}\)\) has not ended within"):
            model.learn(400)
    assert time.monotonic() - before < 60
    assert model._n_updates == number // 8
    assert model.ep_info_buffer is not None
    assert len(model.ep_info_buffer) == number


def test_an_executor_that_is_shut_down(pool: Executor):
    executor = ThreadPoolExecutor(1)
    model = make_model(executor, n_episodes=3).learn(60)
    n_updates = model._n_updates
    executor.shutdown()
    with pytest.raises(RuntimeError, match=r"takes no more tasks .*: give one that is running"):
        model.learn(60, reset_num_timesteps=False)
    assert model._n_updates == n_updates
    model.workers = pool
    model.learn(400 - model.num_timesteps, reset_num_timesteps=False)
    assert_same(summary(model) | dict(logged=None), reference("n_episodes") | dict(logged=None))


def test_what_a_callback_raises_leaves_no_process():
    class Own(Exception):
        pass

    def callback(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        raise Own

    with no_process_left():
        model = make_model(1, n_episodes=3)
        with pytest.raises(Own):
            model.learn(60, callback=callback)
        assert not model._running_workers


def test_a_limit_that_no_episode_reaches(pool: Executor):
    assert_same(train(pool, n_steps=12, episode_timeout=60.0)[1], reference("n_steps"))


SCRIPT = """
import sys
from functools import partial
from stable_baselines3.common.callbacks import ConvertCallback
from sb3_reinforce import REINFORCE
from sb3_reinforce.tools.checkpoints import AtomicCheckpointCallback
from tests.integration.test_workers import Delayed

if __name__ == "__main__":
    model = REINFORCE("MlpPolicy", partial(Delayed, 30), seed=3, workers=2, n_episodes=40)

    def tell(locals_, globals_):
        if model._n_updates == 2:
            print("started", flush=True)
        return True

    checkpoints = [AtomicCheckpointCallback(sys.argv[1])] if sys.argv[2:] != ["plain"] else []
    model.learn(10**9, callback=[ConvertCallback(tell), *checkpoints])
"""


@contextmanager
def program(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen, list[Any]]]:
    """A program that learns on workers and saves checkpoints, in a process group of its own; and its processes."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(script), str(folder / "checkpoints"), *arguments]
    # A file, because whoever is left would keep a pipe open
    with open(folder / "printed", "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env=os.environ | dict(PYTHONPATH=path)
        )
        try:
            deadline = time.monotonic() + 120
            while "started" not in (printed := (folder / "printed").read_text()):
                assert process.poll() is None and time.monotonic() < deadline, printed
                time.sleep(0.1)
            children = psutil.Process(process.pid).children(recursive=True)
            yield process, children
        finally:
            for one in (process, *children):
                try:
                    one.kill()
                except psutil.Error:
                    continue
            process.wait()


def wait_for_end(children: list[Any], n_seconds: float) -> list[Any]:
    """Those that have not ended after some seconds."""
    return psutil.wait_procs(children, timeout=n_seconds)[1]


@pytest.mark.skipif(os.name != "posix", reason="There are no process groups")
@pytest.mark.parametrize(
    "number, group",
    [
        pytest.param(signal.SIGINT, True, id="ctrl_c"),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow, id="sigterm"),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow, id="sigint"),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow, id="sigterm_to_all"),
    ],
)
def test_a_program_that_is_stopped_saves_and_leaves_nothing(tmp_path: Path, number: int, group: bool):
    """A terminal sends Ctrl-C to workers as well."""
    with program(tmp_path) as (process, children):
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        process.wait(60)
        assert not wait_for_end(children, 20)
    assert "To go on: REINFORCE.load(" in (tmp_path / "printed").read_text()
    checkpoint = newest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert REINFORCE.load(checkpoint)._n_updates >= 2


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="There are no process groups")
def test_a_program_without_checkpoints_is_interrupted(tmp_path: Path):
    with program(tmp_path, "plain") as (process, children):
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) != 0
        assert not wait_for_end(children, 5)
    printed = (tmp_path / "printed").read_text()
    assert printed.rstrip().endswith("KeyboardInterrupt")
    assert printed.count("Traceback") == 1
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.skipif(os.name != "posix", reason="There is no SIGKILL")
def test_a_program_that_is_killed_leaves_nothing(tmp_path: Path):
    """As by the kernel when memory runs out."""
    with program(tmp_path) as (process, children):
        assert len(children) >= 2
        process.kill()
        process.wait(10)
        assert not wait_for_end(children, 5)


# RL Zoo ----------------------------------------------------------------------------------------------------------------------

ENV = "LunarLanderContinuous-v3"
OPTIONS = ["--env", ENV, "--eval-freq", "-1", "--save-freq", "-1", "--seed", "1", "-n"]


def zoo(monkeypatch: pytest.MonkeyPatch, n_timesteps: int, *options: str, params: tuple[str, ...] = ("n_steps:300",)) -> None:
    """``sb3-reinforce train``"""
    pytest.importorskip("rl_zoo3")
    from sb3_reinforce import zoo as module

    # It is put back after the test
    monkeypatch.setenv(module.WORKERS, "0")
    command = ["sb3-reinforce", "train", *OPTIONS, str(n_timesteps), *options, "-params", "n_envs:1", *params]
    monkeypatch.setattr(sys, "argv", command)
    module.main()


def zoo_model(folder: str) -> REINFORCE:
    return REINFORCE.load(Path("logs", "reinforce", folder, f"{ENV}.zip"))


def test_the_zoo_trains_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As without them, with evaluations and monitor files."""
    monkeypatch.chdir(tmp_path)
    for options in (["--workers", "2"], []):
        with no_process_left():
            zoo(monkeypatch, 1000, "--eval-freq", "300", "--eval-episodes", "1", *options)
    model = zoo_model(f"{ENV}_1")
    assert_same_parameters(model, zoo_model(f"{ENV}_2"))
    folder = Path(f"logs/reinforce/{ENV}_1")
    assert len(np.load(folder / "evaluations.npz")["timesteps"]) == 3
    assert model.ep_info_buffer is not None
    wanted = {(info["r"], info["l"]) for info in model.ep_info_buffer}
    results = load_results(str(folder))
    assert wanted <= set(zip(results["r"], results["l"], strict=True))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_zoo_goes_on_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int):
    monkeypatch.chdir(tmp_path)
    options = ["--workers", str(workers)]
    zoo(monkeypatch, 1000, *options)
    folder = f"logs/reinforce/{ENV}_1"
    n_results = len(load_results(folder))
    zoo(monkeypatch, 2000, "-i", folder, *options)
    assert not Path(f"logs/reinforce/{ENV}_2").exists()
    assert len(load_results(folder)) > n_results
    zoo(monkeypatch, 2000, *options)
    assert_same_parameters(zoo_model(f"{ENV}_1"), zoo_model(f"{ENV}_2"))


@pytest.mark.parametrize("params", ["normalize:True", "frame_stack:2"])
def test_the_zoo_says_what_workers_cannot_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="--workers: wrappers of a VecEnv"):
        zoo(monkeypatch, 300, "--workers", "1", params=("n_steps:300", params))


@pytest.mark.parametrize("goes_on", [False, True], ids=["new", "goes_on"])
def test_the_zoo_collects_as_much_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes_on: bool):
    """The hyperparameters count steps of each of several environments, and so does a model that had them."""
    monkeypatch.chdir(tmp_path)
    params = ("n_steps:50", "n_envs:4")
    options = []
    if goes_on:
        zoo(monkeypatch, 300, params=params)
        options = ["-i", f"logs/reinforce/{ENV}_1"]
    collected: list[int] = []

    def learn(self: REINFORCE, *args: Any, **kwargs: Any) -> None:
        assert self.workers == 1
        collected.append(self.n_steps * self.n_envs)
        raise NotImplementedError

    monkeypatch.setattr(REINFORCE, "learn", learn)
    # Callbacks are told of an end of which they have seen no beginning
    with pytest.raises((NotImplementedError, AttributeError)):
        zoo(monkeypatch, 600, *options, "--workers", "1", params=params)
    assert collected == [200]
