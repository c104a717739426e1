"""The cheap ``DummyVecEnv``: nobody can tell it from SB3's, but for members that are left alone."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_reinforce import REINFORCE
from sb3_reinforce.vec_env import EpisodeVecEnv
from tests.envs import RandomEnv, ScriptedEnv

VECTOR = spaces.Box(-1, 1, (3,))
IMAGE = spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)


def same(one: Any, other: Any) -> bool:
    """Equal in value, type and structure, all the way down; times of the monitors aside."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(key == "t" or same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


def both(make: Callable[[], gym.Env], n_envs: int) -> tuple[EpisodeVecEnv, DummyVecEnv]:
    return EpisodeVecEnv([make for _ in range(n_envs)]), DummyVecEnv([make for _ in range(n_envs)])


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize(
    "space", [VECTOR, IMAGE, spaces.Discrete(3), spaces.MultiBinary(2), spaces.Dict({"v": VECTOR, "d": spaces.Discrete(3)})]
)
def test_returns_what_dummy_vec_env_returns(space: spaces.Space, n_envs: int):
    mine, theirs = both(lambda: Monitor(RandomEnv(space, spaces.Discrete(2), 4)), n_envs)
    for env in (mine, theirs):
        env.seed(3)
    assert same(mine.reset(), theirs.reset())
    actions = np.zeros(n_envs, dtype=int)
    for _ in range(40):
        assert same(mine.step(actions), theirs.step(actions))
        assert same(mine.reset_infos, theirs.reset_infos)


class Recycling(ScriptedEnv):
    """Returns the same objects again and again."""

    def __init__(self) -> None:
        super().__init__([5])
        self.array = np.zeros(3, dtype=np.float32)
        self.info: dict[str, Any] = {"array": self.array, "list": [0], "nested": {"n": [0]}, "number": 0}

    def step(self, action: np.ndarray) -> Any:
        _, reward, *ends, _ = super().step(action)
        self.array += 1
        self.info["list"][0] += 1
        self.info["nested"]["n"][0] += 1
        self.info["number"] += 1
        return self.array, reward, *ends, self.info


def test_what_was_returned_stays_as_it_is():
    mine, theirs = both(Recycling, 2)
    actions = np.zeros((2, 2))
    for env in (mine, theirs):
        env.reset()
    returned = [(mine.step(actions), theirs.step(actions)) for _ in range(12)]
    for one, other in returned:
        assert same(one, other)
    assert returned[0][0][3][0]["nested"] == {"n": [1]}


def test_members_that_are_not_active_are_not_stepped():
    env = EpisodeVecEnv([lambda index=index: ScriptedEnv([3], index) for index in range(2)])
    env.reset()
    env.step(np.zeros((2, 2)))
    env.active = np.array([True, False])
    obs, rewards, dones, infos = env.step(np.zeros((2, 2)))
    np.testing.assert_array_equal(obs, [[0, 0, 2], [1, 0, 1]])
    np.testing.assert_array_equal(rewards, [2, 0])
    assert not dones.any()
    assert infos[1] == {}


def test_idle_members_cost_no_steps_and_no_resets():
    env = EpisodeVecEnv([lambda: ScriptedEnv([6], 0), lambda: ScriptedEnv([2], 1)])
    model = REINFORCE("MlpPolicy", env, n_steps=1)
    model.learn(1)
    assert model.num_timesteps == len(model.rollout_buffer.rewards) == 8
    assert model.logger.name_to_value["rollout/idle_fraction"] == 0
    model.learn(16)
    # One reset by each learn(), and one after each of the three episodes
    assert [member.n_resets for member in env.envs] == [5, 5]
    assert env.active is None


def test_all_members_are_active_again_after_a_rollout_that_was_interrupted():
    env = EpisodeVecEnv([lambda: ScriptedEnv([6], 0), lambda: ScriptedEnv([2], 1)])
    REINFORCE("MlpPolicy", env, n_steps=1).learn(1, callback=lambda locals_, globals_: locals_["n_steps"] < 4)
    assert env.active is None


def test_wrappers_that_count_steps_get_them_all():
    env = VecNormalize(EpisodeVecEnv([lambda: ScriptedEnv([6], 0), lambda: ScriptedEnv([2], 1)]))
    model = REINFORCE("MlpPolicy", env, n_steps=1)
    model.learn(1)
    assert model.num_timesteps == 12


def test_learning_is_the_same_as_with_dummy_vec_env():
    weights = []
    for vec_env_cls in (EpisodeVecEnv, DummyVecEnv):
        env = make_vec_env("CartPole-v1", n_envs=3, vec_env_cls=vec_env_cls)
        # Not the default schedule, which is at 0 at the end of each call of learn()
        model = REINFORCE("MlpPolicy", env, n_steps=60, seed=0, learning_rate=1e-3)
        for _ in range(3):
            model.learn(1, reset_num_timesteps=False)
        weights.append(np.concatenate([value.numpy().ravel() for value in model.policy.state_dict().values()]))
    np.testing.assert_array_equal(*weights)


def test_single_environments_and_names_are_wrapped_in_it():
    model = REINFORCE("MlpPolicy", "CartPole-v1")
    assert type(model.get_env()) is EpisodeVecEnv
    for given in ("CartPole-v1", gym.make("CartPole-v1")):
        model.set_env(given)
        assert type(model.get_env()) is EpisodeVecEnv
    model = REINFORCE("MlpPolicy", gym.make("CartPole-v1"))
    assert type(model.get_env()) is EpisodeVecEnv
    assert model.get_env().env_is_wrapped(Monitor) == [True]
