"""``EpisodeVecEnv`` against ``DummyVecEnv``, idle sub-environments, and how environments are wrapped."""

from collections.abc import Callable
from contextlib import closing, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import RescaleAction, TimeLimit, TransformReward
from stable_baselines3 import A2C
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv, wrap_env
from tests.envs import OwnVecEnv, RandomEnv, RandomLengthEnv, ScriptedEnv, Simulators, subproc
from tests.rollouts import SMALL, assert_same

VECTOR = spaces.Box(-1, 1, (3,))
IMAGE = spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)


def both(make: Callable[[], gym.Env], n_envs: int) -> tuple[EpisodeVecEnv, DummyVecEnv]:
    return EpisodeVecEnv([make] * n_envs), DummyVecEnv([make] * n_envs)


# Stepped by others -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space", [VECTOR, IMAGE, spaces.Discrete(3), spaces.MultiBinary(2), spaces.Dict({"v": VECTOR, "d": spaces.Discrete(3)})]
)
def test_returns_the_same_as_dummy_vec_env(space: spaces.Space):
    mine, theirs = both(lambda: Monitor(RandomEnv(space, spaces.Discrete(2), 4)), 3)
    for env in (mine, theirs):
        env.seed(3)
    assert_same(mine.reset(), theirs.reset())
    for _ in range(40):
        assert_same(mine.step(np.zeros(3, dtype=int)), theirs.step(np.zeros(3, dtype=int)))
        assert_same(mine.reset_infos, theirs.reset_infos)
        assert_same(mine.buf_infos, theirs.buf_infos)


class Recycling(ScriptedEnv):
    """Changes and returns the same objects in each step."""

    def __init__(self) -> None:
        super().__init__([5])
        self.array = np.zeros(3, dtype=np.float32)
        self.info: dict[str, Any] = {"array": self.array, "nested": {"n": [0]}, "number": 0}

    def step(self, action: np.ndarray) -> Any:
        _, reward, *ends, _ = super().step(action)
        self.array += 1
        self.info["nested"]["n"][0] += 1
        self.info["number"] += 1
        return self.array, reward, *ends, self.info


def test_returned_objects_do_not_change():
    mine, theirs = both(Recycling, 2)
    for env in (mine, theirs):
        env.reset()
    returned = [(mine.step(np.zeros((2, 2))), theirs.step(np.zeros((2, 2)))) for _ in range(12)]
    for one, other in returned:
        assert_same(one, other)
    assert returned[0][0][3][0]["nested"] == {"n": [1]}


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_is_a_dummy_vec_env_again_after_an_interrupted_rollout(error: type[BaseException] | None):
    def interrupt(locals_: dict, globals_: dict) -> bool:
        if locals_["n_steps"] == 3 and error is not None:
            raise error
        return bool(locals_["n_steps"] < 3)

    mine, theirs = both(lambda: RandomLengthEnv(5), 3)
    with nullcontext() if error is None else pytest.raises(error):
        REINFORCE("MlpPolicy", mine, n_steps=10, seed=0, **SMALL).learn(1, callback=interrupt)
    for env in (mine, theirs):
        env.seed(3)
    assert_same(mine.reset(), theirs.reset())
    for _ in range(20):
        assert_same(mine.step(np.zeros((3, 2))), theirs.step(np.zeros((3, 2))))


@pytest.mark.parametrize("n_envs", [1, 3])
def test_other_algorithms_step_the_environments_after_learn(n_envs: int):
    """Sub-environments that were left at the end of an episode are reset before they are stepped."""
    env = DummyVecEnv([lambda: Monitor(ScriptedEnv([4, 6]))] * n_envs)
    a2c = A2C("MlpPolicy", env, n_steps=7).learn(20)
    model = REINFORCE("MlpPolicy", env, n_steps=10, n_episodes=None).learn(20)
    resets = [member.unwrapped.n_resets for member in env.envs]
    env.step(np.zeros((n_envs, 2)))
    assert [member.unwrapped.n_resets for member in env.envs] == [n + 1 for n in resets]
    a2c.learn(20, reset_num_timesteps=False)
    model.learn(20, reset_num_timesteps=False)
    assert {info["l"] for info in model.ep_info_buffer} <= {4, 6}


# Stepped by REINFORCE --------------------------------------------------------------------------------------------------------


class Informative(ScriptedEnv):
    def step(self, action: np.ndarray) -> Any:
        *rest, info = super().step(action)
        info |= {"drag": float(sum(self.lengths_run)), "nested": {"list": [self.steps]}}
        return *rest, info | {"is_success": True, "array": np.ones(2), "name": "x"}


@pytest.mark.parametrize("truncated", [False, True])
def test_idle_sub_environments_are_not_stepped_and_their_infos_mark_no_end(truncated: bool):
    """Callbacks can read all infos at each step, as in SB3 issue 1437."""
    env = DummyVecEnv([lambda length=n: Monitor(Informative([length], truncated=truncated)) for n in (6, 2)])

    def callback(locals_: dict, globals_: dict) -> bool:
        step, (_, info) = locals_["n_steps"], locals_["infos"]
        reward, done = locals_["rewards"][1], locals_["dones"][1]
        np.testing.assert_array_equal(locals_["new_obs"], [[0, 0, step], [0, 0, min(step, 2)]])
        assert locals_["active"].tolist() == [True, step <= 2]
        assert (reward, done) == ((step, step == 2) if step <= 2 else (0, False))
        assert info["TimeLimit.truncated"] == (truncated and step == 2)
        if step > 2:
            # What callbacks count includes no idle step
            assert not info.pop("array").any()
            assert info == {"drag": 0, "nested": {"list": [2]}, "is_success": False, "name": "x", "TimeLimit.truncated": False}
            # The next step returns another copy
            info["nested"]["list"][0] = -1
        # DummyVecEnv keeps the infos of the latest step
        assert [member["drag"] for member in env.buf_infos] == [step, min(step, 2)]
        assert ("episode" in env.buf_infos[1], "terminal_observation" in env.buf_infos[1]) == (step >= 2, step >= 2)
        return True

    model = REINFORCE("MlpPolicy", env, n_steps=1, **SMALL).learn(1, callback=callback)
    assert model.num_timesteps == 8
    assert [env.unwrapped.lengths_run for env in env.envs] == [[6], [2]]  # type: ignore[attr-defined]
    assert [(info["l"], info["r"]) for info in model.ep_info_buffer] == [(2, 3), (6, 21)]


def test_an_environment_that_returns_the_same_info_again_ends_an_episode_once():
    class Same(ScriptedEnv):
        def step(self, action: np.ndarray) -> Any:
            return *super().step(action)[:-1], vars(self).setdefault("info", {})

    env = DummyVecEnv([lambda length=n: Monitor(Same([length])) for n in (5, 2)])
    model = REINFORCE("MlpPolicy", env, n_steps=5, **SMALL).learn(1)
    assert len(model.ep_info_buffer) == model.rollout_buffer.episode_starts.sum()


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("make", [DummyVecEnv, EpisodeVecEnv, subproc, lambda fns: VecNormalize(EpisodeVecEnv(fns))])
def test_monitors_that_forbid_early_resets_raise_nothing(make: Callable[[list], VecEnv], seed: int | None):
    with closing(make([lambda: Monitor(RandomLengthEnv(9), allow_early_resets=False) for _ in range(3)])) as env:
        model = REINFORCE("MlpPolicy", env, n_steps=6, seed=seed, **SMALL)
        # Only an EpisodeVecEnv begins anew without an early reset
        for resets in [True, False, *[True] * (type(model.env) is EpisodeVecEnv)]:
            before = model._n_updates
            assert model.learn(60, reset_num_timesteps=resets)._n_updates > before


@pytest.mark.parametrize("seed", [None, 0])
def test_options_and_seeds_of_the_user_reach_one_reset(seed: int | None):
    dummy: Any = DummyVecEnv([lambda: ScriptedEnv([3]), lambda: ScriptedEnv([3])])
    dummy.set_options({"level": 1})
    dummy.seed(7)
    model = REINFORCE("MlpPolicy", dummy, n_steps=6, seed=seed, **SMALL).learn(1)
    assert [env.options for env in dummy.envs] == [[{"level": 1}, None]] * 2
    # The seeds of a model replace those of the user
    assert ([env.seeds for env in dummy.envs] == [[7, None], [8, None]]) == (seed is None)
    dummy.set_options([{"level": 2}, {}])
    model.learn(1)
    assert [env.options[2:] for env in dummy.envs] == [[{"level": 2}, None], [None, None]]


# Wrapping --------------------------------------------------------------------------------------------------------------------


def test_ids_functions_and_environments_become_an_episode_vec_env():
    model = REINFORCE("MlpPolicy", "CartPole-v1", **SMALL)
    for source in ("CartPole-v1", gym.spec("CartPole-v1"), gym.make("CartPole-v1"), lambda: gym.make("CartPole-v1")):
        model.set_env(source)
        for env in (wrap_env(source), model.env):
            assert type(env) is EpisodeVecEnv and env.num_envs == 1
            assert env.env_is_wrapped(Monitor) == [True]
            assert env.get_attr("render_mode") == [None]
    monitored = RescaleAction(Monitor(ScriptedEnv([3])), -2, 2)  # type: ignore[arg-type]
    assert wrap_env(monitored).envs == [monitored]  # type: ignore[attr-defined]


def test_a_dummy_vec_env_is_converted_and_a_subclass_is_not():
    fns: list[Any] = [lambda: ScriptedEnv([6]), lambda: ScriptedEnv([2])]
    dummy, own = DummyVecEnv(fns), OwnVecEnv(fns)
    assert wrap_env(dummy) is dummy and type(dummy) is EpisodeVecEnv
    model = REINFORCE("MlpPolicy", own, n_steps=1, **SMALL).learn(1)
    assert model.env is own and type(own) is OwnVecEnv
    # The idle environment is stepped
    assert model.num_timesteps == 12


SOURCES: dict[str, Callable[[], Any]] = {
    "id": lambda: "Pendulum-v1",
    "spec": lambda: gym.spec("Pendulum-v1"),
    "function": lambda: lambda: gym.make("Pendulum-v1"),
    "environment": lambda: gym.make("Pendulum-v1"),
    "monitored environment": lambda: Monitor(gym.make("Pendulum-v1")),
    "wrapper around a monitored environment": lambda: TransformReward(Monitor(gym.make("Pendulum-v1")), lambda r: r),
}


@pytest.mark.parametrize("source", SOURCES)
def test_max_episode_steps_is_a_time_limit_that_the_monitor_sees(source: str):
    env = wrap_env(SOURCES[source](), 7)
    assert type(env) is EpisodeVecEnv and env.max_episode_steps == 7
    env.reset()
    rewards = []
    for step in range(1, 15):
        _, reward, done, (info,) = env.step(np.zeros((1, 1)))
        rewards.append(float(reward[0]))
        assert bool(done[0]) == info["TimeLimit.truncated"] == (step % 7 == 0)
        if done[0]:
            assert info["episode"]["l"] == 7
            assert info["episode"]["r"] == pytest.approx(sum(rewards[-7:]), abs=1e-4)
            assert info["terminal_observation"].shape == (3,)


def test_max_episode_steps_leaves_shorter_limits_ends_of_episodes_and_the_given_monitor_alone():
    env = wrap_env(TimeLimit(ScriptedEnv([None]), 4), 7)
    env.reset()
    assert [bool(env.step(np.zeros((1, 2)))[2][0]) for _ in range(5)] == [False, False, False, True, False]
    env = wrap_env(ScriptedEnv([3]), 3)
    env.reset()
    assert not any(env.step(np.zeros((1, 2)))[3][0]["TimeLimit.truncated"] for _ in range(3))
    monitor = Monitor(ScriptedEnv([60]))
    for limit, length in ((10, 10), (30, 30), (None, 60)):
        model = REINFORCE("MlpPolicy", monitor, n_steps=60, n_episodes=None, max_episode_steps=limit).learn(60)
        assert {info["l"] for info in model.ep_info_buffer} == {length}


VEC_ENVS: dict[str, Callable[[], VecEnv]] = {
    "DummyVecEnv": lambda: DummyVecEnv([lambda: ScriptedEnv([3])]),
    "VecNormalize": lambda: VecNormalize(EpisodeVecEnv([lambda: ScriptedEnv([3])])),
    "Simulators": lambda: Simulators([[3]]),
}


@pytest.mark.parametrize("name", VEC_ENVS)
def test_max_episode_steps_is_used_wherever_an_environment_is_given_and_refused_with_a_vec_env(name: str, tmp_path: Path):
    env, model = VEC_ENVS[name](), REINFORCE("MlpPolicy", ScriptedEnv([None]), n_steps=35, max_episode_steps=7, **SMALL)
    model.save(tmp_path / "model")
    uses: list[Callable[[Any], REINFORCE]] = [
        lambda env: REINFORCE("MlpPolicy", env, n_steps=35, max_episode_steps=7, **SMALL),
        lambda env: model.set_env(env) or model,
        lambda env: REINFORCE.load(tmp_path / "model", env),
    ]
    for use in uses:
        before = model.env
        with pytest.raises(ValueError, match=f"max_episode_steps=7 cannot be applied to a {name}: .*env_kwargs="):
            use(env)
        assert model.env is before
        assert use(ScriptedEnv([None])).learn(1).rollout_buffer.size() == 35
    assert REINFORCE.load(tmp_path / "model", env=env, max_episode_steps=None).learn(1)._n_updates == 1
    # The model's own environment has that limit
    assert REINFORCE.load(tmp_path / "model", env=model.env).env is model.env
    with pytest.raises(ValueError, match="max_episode_steps=6 cannot be applied"):
        REINFORCE.load(tmp_path / "model", env=model.env, max_episode_steps=6)


def test_a_copy_of_the_environment_has_no_model(tmp_path: Path):
    model = REINFORCE("MlpPolicy", lambda: ScriptedEnv([5]), n_steps=10, tensorboard_log=str(tmp_path), **SMALL).learn(1)
    env: Any = model.get_env()
    copied = deepcopy(env)
    assert env.user is model and copied.user is None
    model.set_env(copied)
    model.learn(1)
