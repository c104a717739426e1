"""Environments with monitor files for workers."""

from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.wrappers import TransformReward
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE, EnvFactory
from tests.executors import FakeExecutor


def wrappers_of(env: Any) -> list[type]:
    types = []
    while isinstance(env, gym.Wrapper):
        types.append(type(env))
        env = env.env
    return [*types, type(env)]


def test_makes_the_environments_of_make_vec_env(tmp_path: Path):
    wrapper_kwargs, monitor_kwargs = dict(func=lambda reward: 2 * reward), dict(info_keywords=("key",))
    common: Any = dict(env_kwargs=dict(max_episode_steps=7), wrapper_class=TransformReward, wrapper_kwargs=wrapper_kwargs)
    env: Any = EnvFactory("CartPole-v1", **common, monitor_dir=str(tmp_path), monitor_kwargs=monitor_kwargs)()
    vec_env = make_vec_env("CartPole-v1", 1, **common, monitor_dir=str(tmp_path / "other"), monitor_kwargs=monitor_kwargs)
    assert isinstance(vec_env, DummyVecEnv)
    assert wrappers_of(env) == wrappers_of(vec_env.envs[0])
    assert env.get_wrapper_attr("info_keywords") == ("key",)
    env.reset(seed=0)
    assert env.step(0)[1] == 2.0
    assert env.get_wrapper_attr("_max_episode_steps") == 7
    env.close()
    assert wrappers_of(EnvFactory(gym.spec("CartPole-v1"))())[0] is Monitor


def test_monitor_files_of_workers_are_read_together(tmp_path: Path):
    """Each environment has its own file. That of the main process has no episodes."""
    make = EnvFactory("CartPole-v1", monitor_dir=str(tmp_path))
    model = REINFORCE("MlpPolicy", make, seed=0, n_steps=None, n_episodes=8, workers=FakeExecutor(2)).learn(1)
    assert len(list(tmp_path.glob("*.monitor.csv"))) == 2
    results, episodes = load_results(str(tmp_path)), model.ep_info_buffer or ()
    assert list(results["l"]) == [episode["l"] for episode in episodes]
    assert list(results["r"]) == [episode["r"] for episode in episodes]
