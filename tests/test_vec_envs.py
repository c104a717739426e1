"""REINFORCE learns from every vectorised environment and wrapper of SB3, and one seed fixes all of it."""

import csv
import multiprocessing
import random
from contextlib import closing

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    is_vecenv_wrapped,
)

from sb3_reinforce import REINFORCE
from sb3_reinforce.vec_env import EpisodeVecEnv
from tests.envs import RandomEnv, ScriptedEnv, scripted

PAIR = spaces.Box(-1, 1, (2,))
SMALL_CNN = dict(features_extractor_kwargs=dict(features_dim=8))


def random_env(observation_space=None):
    # With a space of its own: it draws its observations from it
    return RandomEnv(observation_space or spaces.Box(-1, 1, (3,)), PAIR, 7)


def short_pendulum():
    return Monitor(gym.make("Pendulum-v1", max_episode_steps=10))


def short_cartpole():
    return Monitor(gym.make("CartPole-v1", max_episode_steps=20))


def subproc(env_fns):
    """Forked where that is possible: the default start method imports PyTorch anew in each process."""
    return SubprocVecEnv(env_fns, start_method="fork" if "fork" in multiprocessing.get_all_start_methods() else None)


def make_model(env, policy="MlpPolicy", **kwargs):
    # Without schedules, which depend on how many steps there are in all, and on whether idle ones are counted
    return REINFORCE(policy, env, **(dict(n_steps=20, seed=0, learning_rate=1e-2) | kwargs))


def learned(env, n_updates=3, callback=None, **kwargs):
    """The state of a model after some updates."""
    model = make_model(env, **kwargs)
    while model._n_updates < n_updates:
        model.learn(1, callback=callback, reset_num_timesteps=False)
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def is_same(one, other):
    assert one.keys() == other.keys()
    return all(th.equal(one[name], other[name]) for name in one)


VARIANTS = [
    pytest.param({}, id="default"),
    pytest.param(dict(baseline="linear", baseline_memory=0.0, normalize_observations=False), id="linear_baseline"),
    pytest.param(dict(policy_kwargs=dict(activation_fn=th.nn.ELU)), id="elu"),
]
GSDE = pytest.param(dict(use_sde=True, sde_sample_freq=4), id="gsde")


class TestDeterminism:
    @pytest.mark.parametrize("n_envs", [1, 4])
    @pytest.mark.parametrize("make_env", [short_cartpole, short_pendulum])
    @pytest.mark.parametrize("kwargs", VARIANTS)
    def test_the_same_seed_learns_the_same_bit_for_bit_and_another_does_not(self, make_env, n_envs, kwargs):
        runs = [learned(DummyVecEnv([make_env] * n_envs), seed=seed, **kwargs) for seed in (1, 1, 2)]
        assert is_same(runs[0], runs[1])
        assert not th.equal(runs[0]["action_net.weight"], runs[2]["action_net.weight"])

    @pytest.mark.parametrize("n_envs", [1, 4])
    def test_with_state_dependent_exploration(self, n_envs):
        runs = [learned(DummyVecEnv([short_pendulum] * n_envs), seed=seed, use_sde=True) for seed in (1, 1, 2)]
        assert is_same(runs[0], runs[1])
        assert not th.equal(runs[0]["log_std"], runs[2]["log_std"])

    @pytest.mark.parametrize("make_env", [short_cartpole, short_pendulum])
    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_processes_learn_the_same_as_this_process(self, make_env, n_envs):
        with closing(subproc([make_env] * n_envs)) as env:
            in_processes = learned(env)
        assert is_same(in_processes, learned(DummyVecEnv([make_env] * n_envs)))

    @pytest.mark.parametrize("kwargs", [*VARIANTS, GSDE])
    def test_draws_of_others_from_the_global_generators_change_nothing(self, kwargs):
        def draw(locals_, globals_):
            random.random(), np.random.rand(), th.rand(1)
            return True

        runs = [learned(DummyVecEnv([short_pendulum] * 2), callback=callback, **kwargs) for callback in (None, draw)]
        assert is_same(*runs)

    @pytest.mark.parametrize("n_envs", [1, 3])
    @pytest.mark.parametrize("kwargs", [*VARIANTS, GSDE])
    def test_learning_leaves_the_global_generators_alone(self, n_envs, kwargs):
        model = make_model(DummyVecEnv([short_pendulum] * n_envs), **kwargs)

        def states():
            return random.getstate(), [str(part) for part in np.random.get_state()], th.get_rng_state().tolist()

        before = states()
        model.learn(30 * n_envs)
        assert model._n_updates >= 1
        assert states() == before

    def test_parts_of_a_run_are_the_run(self):
        whole = make_model(DummyVecEnv([short_pendulum] * 2)).learn(160)
        parts = make_model(DummyVecEnv([short_pendulum] * 2)).learn(1)
        while parts._n_updates < whole._n_updates:
            parts.learn(1, reset_num_timesteps=False)
        assert whole._n_updates == 4
        assert is_same(whole.policy.state_dict(), parts.policy.state_dict())

    def test_without_a_seed_the_global_seed_decides(self):
        runs = []
        for seed in (0, 0, 1):
            set_random_seed(seed)
            runs.append(learned(make_vec_env(short_pendulum, n_envs=2, seed=5), seed=None))
        assert is_same(runs[0], runs[1])
        assert not th.equal(runs[0]["action_net.weight"], runs[2]["action_net.weight"])

    def test_the_environments_have_seeds_of_their_own_and_new_ones_each_iteration(self):
        first_observations = []

        def note(locals_, globals_):
            first_observations.append(locals_["self"]._last_obs[:, 2])  # the angular velocity, random at the reset
            return True

        env = DummyVecEnv([short_pendulum] * 3)
        model = make_model(env, n_steps=10)
        model.learn(1, callback=note)
        model.learn(1, callback=note, reset_num_timesteps=False)
        starts = np.concatenate([first_observations[0], first_observations[10]])
        assert len(set(starts.tolist())) == 6


class TestSubprocVecEnv:
    @pytest.mark.parametrize(
        "policy, observation_space, kwargs",
        [
            pytest.param("MlpPolicy", spaces.Box(-1, 1, (3,)), {}, id="vector"),
            pytest.param(
                "MultiInputPolicy",
                spaces.Dict(vec=spaces.Box(-1, 1, (3,)), img=spaces.Box(0, 255, (36, 36, 1), np.uint8), n=spaces.Discrete(3)),
                dict(features_extractor_kwargs=dict(cnn_output_dim=8)),
                id="dict",
            ),
        ],
    )
    def test_learns(self, policy, observation_space, kwargs):
        with closing(subproc([lambda: Monitor(random_env(observation_space))] * 2)) as env:
            model = make_model(env, policy, policy_kwargs=kwargs, bootstrap_timeouts=True).learn(100)
        assert model._n_updates >= 2
        assert len(model.ep_info_buffer) >= 10

    def test_an_endless_episode_is_cut_with_a_warning(self):
        class Endless(ScriptedEnv):
            def __init__(self):
                super().__init__([None])
                self.cannot_be_sent_to_another_process = (number for number in range(3))

        with closing(subproc([Endless] * 2)) as env:
            with pytest.warns(UserWarning, match="An episode of environment 0 was cut after max_episode_steps=30"):
                model = make_model(env, max_episode_steps=30).learn(1)
        assert model._n_updates == 1


class TestVecNormalize:
    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_statistics_follow_training(self, n_envs):
        env = VecNormalize(DummyVecEnv([random_env] * n_envs), clip_obs=0.5, clip_reward=0.25)
        model = make_model(env, bootstrap_timeouts=False).learn(200)
        assert model.get_vec_normalize_env() is env
        assert env.obs_rms.count > model.num_timesteps
        buffer = model.rollout_buffer
        assert np.abs(buffer.observations).max() == 0.5
        assert np.abs(buffer.rewards).max() == 0.25

    def test_of_chosen_entries_of_a_dictionary(self):
        space = spaces.Dict(far=spaces.Box(90, 110, (2,)), near=spaces.Box(90, 110, (2,)))
        env = VecNormalize(DummyVecEnv([lambda: random_env(space)]), norm_obs_keys=["near"])
        observations = make_model(env, "MultiInputPolicy").learn(100).rollout_buffer.observations
        assert np.abs(observations["near"]).max() <= 10
        assert observations["far"].min() >= 90

    def test_works_beside_the_normalisation_of_the_policy(self):
        env = VecNormalize(DummyVecEnv([random_env]))
        model = make_model(env, normalize_observations=True).learn(100)
        mean = model.policy.observation_normalizer.mean_0
        assert th.all(mean.abs() < 0.5) and th.any(mean != 0)

    def test_evaluation_uses_the_statistics_of_training(self):
        env = VecNormalize(DummyVecEnv([lambda: Monitor(random_env())] * 2))
        eval_env = VecNormalize(DummyVecEnv([lambda: Monitor(random_env())]), training=False, norm_reward=False)
        callback = EvalCallback(eval_env, eval_freq=1, n_eval_episodes=1, verbose=0)
        make_model(env).learn(60, callback=callback)
        np.testing.assert_array_equal(eval_env.obs_rms.mean, env.obs_rms.mean)
        assert eval_env.obs_rms.count == env.obs_rms.count > 60

    def test_statistics_are_saved_with_checkpoints(self, tmp_path):
        env = VecNormalize(DummyVecEnv([random_env]))
        model = make_model(env).learn(1)
        model.learn(1, callback=CheckpointCallback(save_freq=1, save_path=tmp_path, save_vecnormalize=True))
        saved = VecNormalize.load(
            tmp_path / f"rl_model_vecnormalize_{model.num_timesteps}_steps.pkl", DummyVecEnv([random_env])
        )
        np.testing.assert_array_equal(saved.obs_rms.mean, env.obs_rms.mean)
        loaded = REINFORCE.load(tmp_path / f"rl_model_{model.num_timesteps}_steps", env=saved)
        assert loaded.get_vec_normalize_env() is saved
        assert loaded.learn(1)._n_updates == 2

    def test_set_env_changes_which_is_used(self):
        one, other = (VecNormalize(DummyVecEnv([random_env])) for _ in range(2))
        model = make_model(one)
        model.set_env(other)
        assert model.get_vec_normalize_env() is other
        count = one.obs_rms.count
        model.learn(50)
        assert one.obs_rms.count == count
        assert other.obs_rms.count >= 50


class TestImagesAndFrames:
    @pytest.mark.parametrize("channels_last", [True, False])
    def test_stacked_images(self, channels_last):
        make_env = lambda: FakeImageEnv(screen_height=36, screen_width=36, channel_first=not channels_last)  # noqa: E731
        env = VecFrameStack(DummyVecEnv([make_env] * 2), 4, channels_order="last" if channels_last else "first")
        model = make_model(env, "CnnPolicy", policy_kwargs=SMALL_CNN).learn(1)
        assert model.rollout_buffer.observations.shape[1:] == (4, 36, 36)
        assert is_vecenv_wrapped(model.get_env(), VecTransposeImage) == channels_last

    def test_stacked_vectors_begin_each_episode_with_zeros(self):
        env = VecFrameStack(scripted([[3, 5], [4]]), 3)
        model = make_model(env).learn(1)
        buffer = model.rollout_buffer
        frames = buffer.observations.reshape(-1, 3, 3)
        steps = frames[:, -1, 2]
        assert not frames[buffer.episode_starts, :2].any()
        later = ~buffer.episode_starts
        np.testing.assert_array_equal(frames[later, 1, 2], steps[later] - 1)

    def test_the_automatic_transposition_can_be_skipped(self):
        """Five stacked frames of 10 channels first look like channels last."""
        make_env = lambda: FakeImageEnv(screen_height=41, screen_width=40, n_channels=10, channel_first=True)  # noqa: E731
        stacked = VecFrameStack(DummyVecEnv([make_env]), 5, channels_order="first")
        env = VecTransposeImage(stacked, skip=True)
        model = make_model(env, "CnnPolicy", policy_kwargs=SMALL_CNN).learn(1)
        assert model.get_env() is env
        assert model.rollout_buffer.observations.shape[1:] == (50, 41, 40)

    def test_images_in_dictionaries_are_transposed(self):
        space = spaces.Dict(img=spaces.Box(0, 255, (36, 40, 3), np.uint8), vec=spaces.Box(-1, 1, (2,)))
        kwargs = dict(policy_kwargs=dict(features_extractor_kwargs=dict(cnn_output_dim=8)))
        model = make_model(random_env(space), "MultiInputPolicy", **kwargs).learn(1)
        assert is_vecenv_wrapped(model.get_env(), VecTransposeImage)
        assert model.rollout_buffer.observations["img"].shape[1:] == (3, 36, 40)


class TestOtherWrappers:
    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_vec_monitor_sees_the_episodes_of_the_batch(self, tmp_path, n_envs):
        with closing(VecMonitor(DummyVecEnv([random_env] * n_envs), str(tmp_path / "log"))) as env:
            model = make_model(env).learn(1)
        buffer = model.rollout_buffer
        starts = np.flatnonzero(buffer.episode_starts)
        lengths = np.diff([*starts, len(buffer.rewards)])
        assert sorted(info["l"] for info in model.ep_info_buffer) == sorted(lengths)
        returns = np.add.reduceat(buffer.rewards, starts)
        np.testing.assert_allclose(sorted(info["r"] for info in model.ep_info_buffer), sorted(returns), atol=1e-4)
        with open(tmp_path / "log.monitor.csv") as file:
            # Episodes of idle environments are in the file, but not in the batch
            n_written = len(list(csv.reader(file))) - 2
        assert n_written == len(starts) if n_envs == 1 else n_written >= len(starts)

    def test_monitor_wraps_environments_that_are_not_vectorised(self):
        model = make_model(random_env())
        assert model.get_env().env_is_wrapped(Monitor) == [True]

    @pytest.mark.parametrize("what", ["reward", "observation", "terminal observation"])
    def test_vec_check_nan_stops_before_anything_is_learned(self, what):
        def spoil(name, episode, step, value):
            return value * np.nan if name == what and episode == 4 else value

        env = VecCheckNan(scripted([[5]], spoil=spoil), raise_exception=True)
        model = make_model(env, n_steps=30, seed=None)
        before = {name: value.clone() for name, value in model.policy.state_dict().items()}
        with pytest.raises((RuntimeError, ValueError), match=r"(?i)\bnan\b"):
            model.learn(1)
        assert is_same(before, model.policy.state_dict())

    def test_vec_check_nan_lets_what_is_finite_pass(self):
        assert make_model(VecCheckNan(DummyVecEnv([random_env] * 2), raise_exception=True)).learn(1)._n_updates == 1

    def test_one_entry_of_a_dictionary_can_be_extracted(self):
        space = spaces.Dict(vec=spaces.Box(-1, 1, (3,)), other=spaces.Discrete(2))
        env = VecExtractDictObs(DummyVecEnv([lambda: random_env(space)] * 2), key="vec")
        assert make_model(env, bootstrap_timeouts=True).learn(100)._n_updates >= 2

    @pytest.mark.parametrize(
        "wrap",
        [
            pytest.param(lambda env: env, id="bare"),
            pytest.param(VecNormalize, id="normalised"),
            pytest.param(VecMonitor, id="monitored"),
            pytest.param(lambda env: VecFrameStack(env, 2), id="stacked"),
        ],
    )
    def test_an_episode_vec_env_learns_the_same_under_every_wrapper(self, wrap):
        one, other = (learned(wrap(cls([random_env] * 3))) for cls in (DummyVecEnv, EpisodeVecEnv))
        assert is_same(one, other)

    def test_all_together(self):
        env = VecNormalize(VecMonitor(VecFrameStack(VecCheckNan(DummyVecEnv([random_env] * 3)), 2)))
        model = make_model(env, bootstrap_timeouts=True).learn(200)
        assert model._n_updates >= 2
        assert model.rollout_buffer.observations.shape[1] == 6


class BatchEnv(VecEnv):
    """
    Environments that live in one array, as on a GPU: no environment of its own behind any index.

    The state goes up with the action; the episodes of environment i have 4 + i steps.
    """

    def __init__(self, n_envs):
        super().__init__(n_envs, spaces.Box(-np.inf, np.inf, (1,)), spaces.Box(-1, 1, (1,)))
        self.lengths = 4 + np.arange(n_envs)

    def reset(self):
        self.state = np.zeros((self.num_envs, 1), np.float32)
        self.steps = np.zeros(self.num_envs, int)
        return self.state.copy()

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        self.state += self.actions
        self.steps += 1
        dones = self.steps == self.lengths
        infos = [{"terminal_observation": state.copy()} if done else {} for state, done in zip(self.state, dones, strict=True)]
        rewards = self.state.ravel().copy()
        self.state[dones], self.steps[dones] = 0, 0
        return self.state.copy(), rewards, dones, infos

    def close(self):
        pass

    def get_attr(self, attr_name, indices=None):
        if attr_name == "render_mode":
            return [None] * self.num_envs
        raise AttributeError(f"there are no single environments to ask for {attr_name}")

    def set_attr(self, attr_name, value, indices=None):
        raise AttributeError("there are no single environments")

    def env_method(self, method_name, *args, indices=None, **kwargs):
        raise AttributeError("there are no single environments")

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * self.num_envs


class TestVecEnvOfOnesOwn:
    def test_learns_from_it(self):
        model = make_model(BatchEnv(3)).learn(300)
        assert model._n_updates >= 3
        assert np.all(np.isin(np.diff(np.flatnonzero(model.rollout_buffer.episode_starts)), [4, 5, 6]))

    def test_cuts_its_endless_episodes_with_a_warning(self):
        env = BatchEnv(2)
        env.lengths[:] = 10**9
        with pytest.warns(UserWarning, match="was cut after max_episode_steps=15"):
            model = make_model(env, max_episode_steps=15).learn(1)
        assert model._n_updates == 1
