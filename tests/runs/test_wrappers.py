"""Learning with SB3's vectorized environments and wrappers, and seeds."""

import random
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import ConvertCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv
from tests.envs import OwnVecEnv, RandomLengthEnv, subproc
from tests.runs.common import Batches, PlaceEnv, assert_same, assert_whole, place, random_env

BASES: dict[str, Callable[[list], VecEnv]] = {"EpisodeVecEnv": EpisodeVecEnv, "SubprocVecEnv": subproc}
#: Kind of PlaceEnv, and its wrapper
WRAPPERS: dict[str, tuple[str, Callable[[Any], VecEnv]]] = {
    "bare": ("vector", lambda env: env),
    "VecMonitor": ("vector", VecMonitor),
    "VecCheckNan": ("vector", lambda env: VecCheckNan(env, raise_exception=True)),
    "VecFrameStack": ("vector", lambda env: VecFrameStack(env, 3)),
    "VecNormalize": ("dict", lambda env: VecNormalize(env, norm_obs_keys=["noise"])),
    "VecExtractDictObs": ("dict", lambda env: VecExtractDictObs(env, "place")),
    "VecTransposeImage by SB3": ("image", lambda env: env),
    "VecTransposeImage, VecFrameStack, VecMonitor": (
        "image",
        lambda env: VecTransposeImage(VecFrameStack(VecMonitor(env), 2)),
    ),
    "VecNormalize, VecMonitor, VecFrameStack, VecCheckNan": (
        "dict",
        lambda env: VecNormalize(VecMonitor(VecFrameStack(VecCheckNan(env), 2)), norm_obs_keys=["noise"]),
    ),
}


def make_place_env(base: str, wrapper: str, n_envs: int = 3) -> VecEnv:
    kind, wrap = WRAPPERS[wrapper]

    def make(index: int) -> gym.Env:
        env = PlaceEnv(index, kind)
        return env if "VecMonitor" in wrapper else Monitor(env)

    return wrap(BASES[base]([partial(make, index) for index in range(n_envs)]))


def make_model(env: Any, policy: str | None = None, **kwargs: Any) -> REINFORCE:
    is_dict = isinstance(env.observation_space, spaces.Dict)
    policy = policy or ("MultiInputPolicy" if is_dict else "MlpPolicy")
    return REINFORCE(policy, env, **(dict(n_steps=20, seed=0, stats_window_size=10**6) | kwargs))


@pytest.mark.parametrize(
    ("base", "wrapper"),
    [*(("EpisodeVecEnv", name) for name in WRAPPERS), ("SubprocVecEnv", "bare"), ("SubprocVecEnv", "VecNormalize")],
)
def test_whole_episodes_are_learned_from_once_and_counted(base: str, wrapper: str):
    batches, steps = Batches(), []

    def callback(locals_: dict, globals_: dict) -> bool:
        steps.append((locals_["self"]._n_updates, locals_["active"].sum(), locals_["self"].num_timesteps))
        return True

    with closing(make_place_env(base, wrapper)) as env:
        model = make_model(env).learn(150, callback=[batches, ConvertCallback(callback)])
    assert len(batches.batches) >= 2
    assert_whole(batches.episodes(place))
    expected = []
    # Idle sub-environments are stepped if a wrapper counts the steps
    is_stepped = base == "SubprocVecEnv" or wrapper not in ("bare", "VecTransposeImage by SB3")
    n_updates, n_active, counts = np.array(steps).T
    n_stepped = np.diff(counts, prepend=0)
    np.testing.assert_array_equal(n_stepped, 3 if is_stepped else n_active)
    for number, batch in enumerate(batches.batches):
        index, episode, step, length = place(batch["observations"])[:, :4].T
        firsts = list(zip(index[batch["starts"]], episode[batch["starts"]], strict=True))
        assert firsts == sorted(firsts)
        rewards = 100 * index + step + 1 + batch["actions"].ravel()
        expected += zip(length[batch["starts"]], np.add.reduceat(rewards, batch["starts"]), strict=True)
        logged = {name: batch["logged"][f"rollout/{name}"] for name in ("episodes", "transitions", "idle_fraction")}
        n_transitions, in_batch = len(batch["rewards"]), n_updates == number
        assert n_transitions >= 60 and logged["episodes"] == len(firsts)
        assert logged["transitions"] == n_transitions == n_active[in_batch].sum()
        assert logged["idle_fraction"] == pytest.approx(1 - n_transitions / n_stepped[in_batch].sum())
    np.testing.assert_allclose(sorted((info["l"], info["r"]) for info in model.ep_info_buffer or ()), sorted(expected))


GAUSSIAN = spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    ("n_envs", "space", "kwargs"),
    [
        (5, GAUSSIAN, {}),
        (3, GAUSSIAN, dict(use_sde=True, sde_sample_freq=4)),
        # Acts with PyTorch
        (2, spaces.MultiDiscrete([3, 4]), dict(policy_kwargs=dict(activation_fn=th.nn.ELU))),
    ],
    ids=str,
)
def test_an_episode_does_not_depend_on_the_number_of_sub_environments(n_envs: int, space: spaces.Space, kwargs: Any):
    """Actions of each episode by its first observation; the actor does not learn."""
    expected, found = {}, {}
    kwargs |= dict(target_kl=None, learning_rate=0.0, normalize_observations=False)
    for n, actions in ((1, expected), (n_envs, found)):
        model, batches = (
            make_model(EpisodeVecEnv([lambda: RandomLengthEnv(12, space)] * n), n_steps=60 // n, **kwargs),
            Batches(),
        )
        model.learn(200, callback=batches)
        parts = [part for batch in batches.batches for part in np.split(batch["actions"], batch["starts"][1:])]
        actions.update(zip((tuple(episode[0]) for episode in batches.episodes()), parts, strict=True))
    shared = expected.keys() & found.keys()
    assert len(shared) >= 20
    for start in shared:
        # Matrix products may sum in another order
        np.testing.assert_allclose(found[start], expected[start], rtol=1e-5, atol=1e-6)


# Seeds -----------------------------------------------------------------------------------------------------------------------


def short_pendulum() -> gym.Env:
    return Monitor(gym.make("Pendulum-v1", max_episode_steps=10))


def learned(env: VecEnv, n_updates: int = 3, callback: Any = None, **kwargs: Any) -> dict[str, th.Tensor]:
    """Return the state of a policy after some updates, each in a call of learn()."""
    with closing(env):
        model = make_model(env, **kwargs)
        while model._n_updates < n_updates:
            model.learn(1, callback=callback, reset_num_timesteps=False)
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


VARIANTS = [
    pytest.param({}, id="default"),
    pytest.param(dict(baseline="linear", baseline_memory=0.0, normalize_observations=False), id="linear baseline"),
    pytest.param(dict(policy_kwargs=dict(activation_fn=th.nn.ELU)), id="elu"),
    pytest.param(dict(use_sde=True, sde_sample_freq=4), id="gsde"),
]


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("kwargs", VARIANTS)
def test_the_same_seed_learns_the_same_whatever_others_draw(n_envs: int, kwargs: dict[str, Any]):
    def draw(locals_: dict, globals_: dict) -> bool:
        random.random(), np.random.rand(), th.rand(1)
        return True

    def run(seed: int, callback: Any = None) -> dict[str, th.Tensor]:
        return learned(DummyVecEnv([short_pendulum] * n_envs), seed=seed, callback=callback, **kwargs)

    first, again, other = run(1), run(1, draw), run(2)
    assert_same(first, again)
    assert not th.equal(first["log_std"], other["log_std"])


def test_processes_learn_the_same_as_this_process():
    assert_same(learned(subproc([short_pendulum] * 3)), learned(OwnVecEnv([short_pendulum] * 3)))


# Wrappers --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 3])
def test_statistics_of_vec_normalize_follow_training_and_evaluation_uses_them(n_envs: int):
    env = VecNormalize(random_env(n_envs), clip_obs=0.5, clip_reward=0.25)
    eval_env = VecNormalize(random_env(), training=False, norm_reward=False)
    model = make_model(env, bootstrap_timeouts=False)
    model.learn(100, callback=EvalCallback(eval_env, eval_freq=1, n_eval_episodes=1, verbose=0))
    assert model.get_vec_normalize_env() is env
    assert eval_env.obs_rms.count == env.obs_rms.count > model.num_timesteps
    np.testing.assert_array_equal(eval_env.obs_rms.mean, env.obs_rms.mean)
    assert np.abs(model.rollout_buffer.observations).max() == 0.5
    assert np.abs(model.rollout_buffer.rewards).max() == 0.25
