"""``EnvPoolVecEnv``: comparison with Gymnasium, VecEnv interface, and training."""

import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor, VecNormalize

from sb3_reinforce import REINFORCE
from sb3_reinforce.tools import EnvPoolVecEnv

pytest.importorskip("envpool")

CART_POLE = "CartPole-v1"
LANDER = "LunarLanderContinuous-v3"
TASKS = [CART_POLE, "LunarLander-v3", LANDER, "Acrobot-v1", "MountainCarContinuous-v0", "Pendulum-v1"]
#: A policy that is created quickly
SMALL: dict[str, Any] = dict(n_steps=None, policy_kwargs=dict(net_arch=[]), baseline=None)


def has_fallen(observation: np.ndarray) -> bool:
    """Return whether the pole has fallen, or the cart has left the track."""
    return bool(abs(observation[2]) > 0.20943951 or abs(observation[0]) > 2.4)


def follows(observation: np.ndarray, following: np.ndarray) -> bool:
    """Return whether an observation of CartPole follows another one."""
    moved = observation[[0, 2]] + 0.02 * observation[[1, 3]]
    return np.allclose(moved, following[[0, 2]], atol=1e-5)


# Comparison with Gymnasium


@pytest.mark.parametrize("task_id", TASKS)
def test_spaces_of_gymnasium(task_id: str):
    env, other = EnvPoolVecEnv(task_id, 3), gym.make(task_id)
    assert env.observation_space == other.observation_space
    assert env.action_space == other.action_space
    obs = env.reset()
    for _ in range(20):
        assert obs.shape == (3, *env.observation_space.shape) and obs.dtype == env.observation_space.dtype
        assert all(env.observation_space.contains(one) for one in obs)
        obs, rewards, dones, _ = env.step(np.array([env.action_space.sample() for _ in range(3)]))
        assert (rewards.shape, rewards.dtype, dones.shape, dones.dtype) == ((3,), np.float32, (3,), bool)
    env.close()


def test_the_end_of_an_episode():
    """Terminal observations, timeouts and statistics are in the infos, as with SB3."""
    env = EnvPoolVecEnv(CART_POLE, 8, seed=0, max_episode_steps=9)
    obs = env.reset()
    returns, lengths, n_ended = np.zeros(8), np.zeros(8, dtype=int), {True: 0, False: 0}
    last_time = 0.0
    for _ in range(100):
        new_obs, rewards, dones, infos = env.step(np.ones(8, dtype=int))
        returns += rewards
        lengths += 1
        for index, info in enumerate(infos):
            assert ("terminal_observation" in info) == ("episode" in info) == dones[index]
            terminal = info.get("terminal_observation", new_obs[index])
            assert follows(obs[index], terminal)
            assert dones[index] == (has_fallen(terminal) or lengths[index] == 9)
            # EnvPool does not report a termination in the last step
            assert info["TimeLimit.truncated"] is bool(lengths[index] == 9)
            if dones[index]:
                n_ended[info["TimeLimit.truncated"]] += 1
                assert (info["episode"]["r"], info["episode"]["l"]) == (returns[index], lengths[index])
                assert info["episode"]["t"] >= last_time
                last_time = info["episode"]["t"]
                assert np.abs(new_obs[index]).max() <= 0.05
                returns[index] = lengths[index] = 0
        obs = new_obs
    assert n_ended[True] > 5 and n_ended[False] > 5


@pytest.mark.parametrize("task_id, limit", [(CART_POLE, 500), ("MountainCarContinuous-v0", 999), ("Pendulum-v1", 200)])
def test_time_limits(task_id: str, limit: int):
    assert gym.spec(task_id).max_episode_steps == limit
    assert EnvPoolVecEnv(task_id, 1).get_attr("spec")[0].config.max_episode_steps == limit
    env = EnvPoolVecEnv("Pendulum-v1", 2, max_episode_steps=7)
    env.reset()
    dones = [env.step(np.zeros((2, 1)))[2].tolist() for _ in range(14)]
    assert dones == [[step in (6, 13)] * 2 for step in range(14)]


# VecEnv interface


def test_returned_arrays_are_copies():
    env = EnvPoolVecEnv(CART_POLE, 3, max_episode_steps=4)
    returned: list[Any] = [env.reset()]
    returned += [env.step(np.zeros(3, dtype=int)) for _ in range(9)]
    arrays: list[np.ndarray] = [returned[0]]
    for obs, rewards, dones, infos in returned[1:]:
        arrays += [obs, rewards, dones, *(info["terminal_observation"] for info in infos if "terminal_observation" in info)]
    copies = [array.copy() for array in arrays]
    for _ in range(9):
        env.step(np.ones(3, dtype=int))
    env.reset()
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)
    assert not any(np.shares_memory(one, other) for one in arrays for other in arrays if one is not other)


def rollout(env: EnvPoolVecEnv) -> np.ndarray:
    observations = [env.reset()]
    for step in range(60):
        observations.append(env.step(np.full(env.num_envs, step % 2))[0])
    return np.array(observations)


def test_seeds():
    one = rollout(EnvPoolVecEnv(CART_POLE, 3, seed=1))
    again = EnvPoolVecEnv(CART_POLE, 3, seed=1)
    assert again.seed(5) == [None] * 3
    np.testing.assert_array_equal(rollout(again), one)
    np.testing.assert_array_equal(rollout(EnvPoolVecEnv(CART_POLE, 3, seed=1, num_threads=3)), one)
    # Resets do not repeat episodes, and the sub-environments of all pools differ
    assert not np.array_equal(rollout(again), one)
    pools = [EnvPoolVecEnv(CART_POLE, n_envs, seed=seed) for n_envs, seed in ((8, 0), (8, 1), (8, 2), (5, 2))]
    starts = [pool.reset() for pool in pools]
    assert len(np.unique(np.concatenate(starts), axis=0)) == 24
    np.testing.assert_array_equal(starts[2][:5], starts[3])


def test_attributes():
    env = EnvPoolVecEnv(CART_POLE, 3)
    assert env.get_attr("spec") == [env.pool.spec] * 3
    assert env.get_attr("spec", indices=[0, 2]) == [env.pool.spec] * 2
    assert env.get_attr("render_mode") == [None] * 3
    with pytest.raises(AttributeError):
        env.get_attr("gravity")
    with pytest.raises(NotImplementedError, match="setting attributes"):
        env.set_attr("gravity", 1.0)
    with pytest.raises(NotImplementedError, match="calling methods"):
        env.env_method("render")
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.env_is_wrapped(Monitor, indices=1) == [True]
    assert env.env_is_wrapped(gym.wrappers.TimeLimit) == [False] * 3
    env.close()


@pytest.mark.parametrize(
    "kwargs",
    [
        *(dict(n_envs=value) for value in (0, 1.5, True, None)),
        *(dict(seed=value) for value in (-1, 2**31, [1, 2])),
        *(dict(num_threads=value) for value in (-1, None)),
    ],
    ids=str,
)
def test_arguments_out_of_range_raise_a_value_error(kwargs: dict[str, Any]):
    """EnvPool aborts the process for some of these values."""
    name, value = next(iter(kwargs.items()))
    with pytest.raises(ValueError, match=rf"{name} must be an integer .*, got {name}={re.escape(repr(value))}"):
        EnvPoolVecEnv(CART_POLE, **(dict(n_envs=2) | kwargs))


def test_options():
    env = EnvPoolVecEnv("FrozenLake-v1", np.int64(2), seed=np.int32(1), num_threads=np.int64(0), size=8)  # type: ignore[arg-type]
    assert env.get_attr("spec")[0].config.size == 8
    with pytest.raises(TypeError, match="unexpected keyword argument 'gravity'"):
        EnvPoolVecEnv(CART_POLE, 2, gravity=1.0)
    # These change the kind of the pool
    for name, value in dict(batch_size=4, env_type="dm", num_envs=3, max_num_players=0).items():
        with pytest.raises(ValueError, match=rf"^{name} is not an option of EnvPoolVecEnv"):
            EnvPoolVecEnv(CART_POLE, 8, **{name: value})


@pytest.mark.parametrize(
    "task_id, message",
    [
        ("LaneKeeping-v0", r"observations that are a single array, but LaneKeeping-v0 has the observation space Dict\("),
        ("SparrowMahjong-v1", "one player, but SparrowMahjong-v1 has 3"),
    ],
)
def test_unsupported_environments_raise_a_value_error(task_id: str, message: str):
    with pytest.raises(ValueError, match=f"EnvPoolVecEnv supports {message}"):
        EnvPoolVecEnv(task_id, 2)


# REINFORCE


class Spy:
    """Record the calls of a pool: ("reset" or "step", indices of sub-environments)."""

    def __init__(self, pool: Any):
        self.pool = pool
        self.calls: list[tuple[str, list[int]]] = []

    def reset(self, env_ids: np.ndarray) -> Any:
        self.calls.append(("reset", env_ids.tolist()))
        return self.pool.reset(env_ids)

    def step(self, actions: np.ndarray, env_ids: np.ndarray) -> Any:
        self.calls.append(("step", env_ids.tolist()))
        return self.pool.step(actions, env_ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)


def spied(n_envs: int, **kwargs: Any) -> tuple[EnvPoolVecEnv, Spy]:
    env = EnvPoolVecEnv(CART_POLE, n_envs, **kwargs)
    spy = env.pool = Spy(env.pool)
    return env, spy


def check_no_double_reset(calls: list[tuple[str, list[int]]]) -> None:
    """Check that sub-environments are stepped between resets."""
    at_start = set()
    for what, env_ids in calls:
        if what == "reset":
            assert not at_start & set(env_ids)
            at_start |= set(env_ids)
        else:
            at_start -= set(env_ids)


class Batches(BaseCallback):
    """Check that batches consist of whole episodes, and record their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[list[int]] = []
        self.idle_fractions: list[float] = []
        self.reported: list[int] = []

    def _on_step(self) -> bool:
        self.reported += [info["episode"]["l"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        observations = buffer.observations
        starts = np.flatnonzero(buffer.episode_starts)
        assert np.abs(observations[starts, -4:]).max() <= 0.05
        for step in set(range(1, len(observations))) - set(starts.tolist()):
            assert follows(observations[step - 1, -4:], observations[step, -4:])
        self.lengths.append(np.diff([*starts, len(observations)]).tolist())
        self.idle_fractions.append(self.model.logger.name_to_value["rollout/idle_fraction"])


@pytest.mark.parametrize("target", [dict(n_episodes=11), dict(n_episodes=2), dict(n_steps=30, n_episodes=None)])
def test_batches_of_whole_episodes_without_idle_steps(target: dict[str, int]):
    env, spy = spied(4, seed=3)
    batches = Batches()
    model = REINFORCE("MlpPolicy", env, seed=0, **(SMALL | target)).learn(2000, callback=batches)
    assert len(batches.lengths) == model._n_updates >= 4
    for lengths in batches.lengths:
        if "n_episodes" in target:
            # At least one per sub-environment
            assert len(lengths) == max(4, target["n_episodes"])
        else:
            assert sum(lengths) >= 4 * 30
    assert sorted(batches.reported) == sorted(length for lengths in batches.lengths for length in lengths)
    assert set(batches.idle_fractions) == {0.0}
    n_stepped = [len(env_ids) for what, env_ids in spy.calls if what == "step"]
    assert sum(n_stepped) == model.num_timesteps == sum(sum(lengths) for lengths in batches.lengths)
    assert 1 in n_stepped and max(n_stepped) == 4
    check_no_double_reset(spy.calls)
    n_resets = sum(len(env_ids) for what, env_ids in spy.calls if what == "reset")
    assert n_resets == sum(len(lengths) for lengths in batches.lengths)


def test_training_is_repeatable():
    models = []
    for seeds in ((0, 5), (0, 5), (0, 50), (1, 5)):
        env = EnvPoolVecEnv(CART_POLE, 4, seed=seeds[1])
        models.append(REINFORCE("MlpPolicy", env, seed=seeds[0], n_steps=None, n_episodes=6).learn(1500))
    states = [th.nn.utils.parameters_to_vector(model.policy.parameters()) for model in models]
    assert th.equal(states[0], states[1])
    assert models[0].num_timesteps == models[1].num_timesteps
    assert not th.equal(states[0], states[2]) and not th.equal(states[0], states[3])


def test_verbose_says_that_resuming_is_not_exact(capsys: pytest.CaptureFixture):
    for verbose in (1, 0):
        model = REINFORCE("MlpPolicy", EnvPoolVecEnv(CART_POLE, 2), seed=0, verbose=verbose, n_episodes=2, **SMALL)
        model.learn(1, log_interval=10**9).learn(1, log_interval=10**9)
        printed = capsys.readouterr().out
        assert printed.count("This run is not exactly reproducible: a EnvPoolVecEnv does not seed each episode") == verbose


def test_save_and_load(tmp_path: Path):
    """Also with another number of sub-environments, or Gymnasium's environment."""
    model = REINFORCE("MlpPolicy", EnvPoolVecEnv(CART_POLE, 4), seed=0, n_steps=None, n_episodes=6).learn(500)
    model.save(tmp_path / "model")
    observations = np.random.default_rng(0).normal(size=(9, 4))
    for n_envs in (4, 7):
        batches = Batches()
        loaded = REINFORCE.load(tmp_path / "model", env=EnvPoolVecEnv(CART_POLE, n_envs, seed=9))
        assert loaded.n_envs == n_envs and loaded.num_timesteps == model.num_timesteps
        chosen = [one.predict(observations, deterministic=True)[0] for one in (model, loaded)]
        np.testing.assert_array_equal(*chosen)
        loaded.learn(500, reset_num_timesteps=False, callback=batches)
        assert loaded._n_updates > model._n_updates
        assert [len(lengths) for lengths in batches.lengths] == [max(6, n_envs)] * len(batches.lengths)
    REINFORCE.load(tmp_path / "model", env=CART_POLE).learn(100, reset_num_timesteps=False)


# Other algorithms, evaluations and wrappers


@pytest.mark.parametrize(
    "algorithm, kwargs, n_timesteps",
    [(A2C, dict(n_steps=16), 12_000), (PPO, dict(n_steps=64), 6_000), (REINFORCE, dict(n_steps=None, n_episodes=8), 10_000)],
)
def test_algorithms_learn(algorithm: Any, kwargs: dict[str, Any], n_timesteps: int):
    """A random policy returns 22. Evaluated with Gymnasium's environment."""
    model = algorithm("MlpPolicy", EnvPoolVecEnv(CART_POLE, 8, seed=0), seed=0, device="cpu", **kwargs)
    model.learn(n_timesteps)
    env = Monitor(gym.make(CART_POLE))
    env.reset(seed=0)
    assert evaluate_policy(model, env, n_eval_episodes=20)[0] > 80
    assert np.mean([info["r"] for info in model.ep_info_buffer]) > 40


@pytest.mark.parametrize("name", ["VecNormalize", "VecFrameStack", "VecMonitor"])
def test_wrappers_of_sb3(name: str, tmp_path: Path):
    wrap = {
        "VecNormalize": lambda env: VecNormalize(env, norm_obs=False),
        "VecFrameStack": lambda env: VecFrameStack(env, 3),
        "VecMonitor": lambda env: VecMonitor(env, str(tmp_path / "monitor")),
    }[name]
    with warnings.catch_warnings():
        # VecMonitor warns because the environment has statistics
        warnings.simplefilter("ignore", UserWarning)
        env = wrap(EnvPoolVecEnv(CART_POLE, 3, seed=0))
    callback = Batches()
    model = REINFORCE("MlpPolicy", env, seed=0, n_episodes=5, **SMALL).learn(1000, callback=callback)
    assert model.ep_info_buffer
    assert [len(lengths) for lengths in callback.lengths] == [5] * model._n_updates
    # Wrappers count the steps of all sub-environments, so idle ones are stepped
    assert max(callback.idle_fractions) > 0
    env.close()
