"""Executor for Ray, with a fake module ``ray``: see tests/runs/test_runs_on_workers.py for the real one."""

import sys
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import pytest

from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes.workers import Workers
from sb3_reinforce.tools.ray import RayExecutor
from tests.envs import RandomLengthEnv
from tests.executors import FakeRay


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def test_the_least_busy_actor_runs_a_function(ray: FakeRay):
    executor = RayExecutor(3, num_gpus=0.5)
    assert ray.options == [dict(num_cpus=1, max_restarts=-1, max_task_retries=2, num_gpus=0.5)] * 3
    assert Workers(executor).count() == 3
    futures = [executor.submit(int, str(number), base=8) for number in range(7)]
    assert sorted(len(actor.calls) for actor in ray.actors) == [2, 2, 3]
    assert not any(future.done() for future in futures)
    ray.run_all()
    assert [future.result() for future in futures] == list(range(7))
    # All actors are free again
    futures = [executor.submit(int, "x") for _ in range(3)]
    assert [len(actor.calls) for actor in ray.actors] == [1, 1, 1]
    ray.run_all()
    with pytest.raises(ValueError, match="invalid literal"):
        futures[0].result()


def test_shutdown_ends_the_actors(ray: FakeRay):
    with RayExecutor(2) as executor:
        executor.submit(abs, -1)
        ray.run_all()
    assert ray.killed == ray.actors
    other = RayExecutor(1)
    future = other.submit(abs, -1)
    other.shutdown(wait=False)
    ray.run_all()
    assert future.exception() is not None
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(abs, -1)
    executor.shutdown()


def test_training_on_actors_equals_training_in_this_process(ray: FakeRay, monkeypatch: pytest.MonkeyPatch):
    result = Future.result
    monkeypatch.setattr(Future, "result", lambda self, timeout=None: (ray.run_all(), result(self, 0))[1])
    kwargs: Any = dict(env=partial(RandomLengthEnv, 9), seed=3, n_steps=None, n_episodes=6, policy_kwargs=dict(net_arch=[4]))
    vectors = [
        REINFORCE("MlpPolicy", workers=workers, **kwargs).learn(60).policy.parameters_to_vector()
        for workers in (RayExecutor(2), None)
    ]
    np.testing.assert_array_equal(*vectors)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'sb3-reinforce\[ray\]'"):
        RayExecutor(2)
