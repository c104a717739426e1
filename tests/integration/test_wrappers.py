"""REINFORCE learns from every vectorized environment and wrapper of SB3, and one seed fixes all of it."""

import csv
import random
from contextlib import closing

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import CheckpointCallback, ConvertCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
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
from sb3_reinforce.episodes.schedule import episode_seed
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv
from tests.envs import RandomEnv, scripted, subproc
from tests.integration.common import (
    PAIR,
    Batches,
    PlaceEnv,
    assert_same,
    assert_same_parameters,
    assert_whole,
    place,
    random_env,
)


class SteppedAsItIs(DummyVecEnv):
    """A ``DummyVecEnv`` that REINFORCE does not take over: its environments are stepped while they are idle."""


#: Kinds of VecEnv
BASES = {"DummyVecEnv": DummyVecEnv, "EpisodeVecEnv": EpisodeVecEnv, "SubprocVecEnv": subproc}
#: Observations of PlaceEnv, and what is put around them
WRAPPERS = {
    "bare": ("vector", lambda env: env),
    "VecMonitor": ("vector", VecMonitor),
    "VecCheckNan": ("vector", lambda env: VecCheckNan(env, raise_exception=True)),
    "VecFrameStack": ("vector", lambda env: VecFrameStack(env, 3)),
    "VecNormalize": ("dict", lambda env: VecNormalize(env, norm_obs_keys=["noise"])),
    "VecExtractDictObs": ("dict", lambda env: VecExtractDictObs(env, "place")),
    "VecTransposeImage": ("image", VecTransposeImage),
    "VecTransposeImage_by_sb3": ("image", lambda env: env),
    "VecTransposeImage_VecFrameStack_VecMonitor": ("image", lambda env: VecTransposeImage(VecFrameStack(VecMonitor(env), 2))),
    "VecNormalize_VecMonitor_VecFrameStack_VecCheckNan": (
        "dict",
        lambda env: VecNormalize(VecMonitor(VecFrameStack(VecCheckNan(env), 2)), norm_obs_keys=["noise"]),
    ),
}
every_base = pytest.mark.parametrize("base", BASES)
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


def make_place_env(base, wrapper, n_envs=3):
    kind, wrap = WRAPPERS[wrapper]

    def make(index):
        env = PlaceEnv(index, kind)
        return env if "VecMonitor" in wrapper else Monitor(env)

    return wrap(BASES[base]([lambda index=index: make(index) for index in range(n_envs)]))


def make_model(env, policy="MlpPolicy", **kwargs):
    return REINFORCE(policy, env, **(dict(n_steps=20, seed=0) | kwargs))


def make_place_model(env, **kwargs):
    is_dict = isinstance(env.observation_space, spaces.Dict)
    return make_model(env, "MultiInputPolicy" if is_dict else "MlpPolicy", **(dict(stats_window_size=10**6) | kwargs))


@every_base
@every_wrapper
@pytest.mark.parametrize("n_envs", [1, 3])
def test_only_whole_episodes_are_learned_from_and_each_once(base, wrapper, n_envs):
    batches = Batches()
    with closing(make_place_env(base, wrapper, n_envs)) as env:
        model = make_place_model(env).learn(150, callback=batches)
        model.learn(1, callback=batches, reset_num_timesteps=False)
        evaluate_policy(model, model.get_env(), n_eval_episodes=2, warn=False)
        model.learn(1, callback=batches, reset_num_timesteps=False)
        model.learn(100, callback=batches)
    assert len(batches.batches) >= 5
    assert all(len(batch["rewards"]) >= 20 * n_envs for batch in batches.batches)
    assert_whole(batches.episodes(place))
    for batch in batches.batches:
        # Environment by environment, in the order in which they were run
        firsts = place(batch["observations"])[batch["starts"], :2].tolist()
        assert firsts == sorted(firsts)


@every_base
@pytest.mark.parametrize("wrapper", ["bare", "VecMonitor"])
@pytest.mark.parametrize("n_episodes", [2, 7])
def test_n_episodes_are_learned_from_at_a_time(base, wrapper, n_episodes):
    batches = Batches()
    with closing(make_place_env(base, wrapper)) as env:
        make_place_model(env, n_steps=None, n_episodes=n_episodes).learn(100, callback=batches)
    assert_whole(batches.episodes(place))
    # One for each environment that is at the start of one when the rollout begins
    n_collected = {len(batch["starts"]) for batch in batches.batches}
    assert n_collected <= set(range(n_episodes, max(n_episodes, 3) + 1))
    if base != "SubprocVecEnv" and wrapper == "bare":
        assert n_collected == {max(n_episodes, 3)}


@every_base
@every_wrapper
def test_statistics_are_those_of_the_episodes_learned_from(base, wrapper):
    batches, steps = Batches(), []

    def note(locals_, globals_):
        steps.append((locals_["self"]._n_updates, locals_["active"].sum(), locals_["self"].num_timesteps))
        return True

    with closing(make_place_env(base, wrapper)) as env:
        model = make_place_model(env).learn(300, callback=[batches, ConvertCallback(note)])
    expected = []
    for batch in batches.batches:
        index, _, step, length = place(batch["observations"])[:, :4].T
        rewards = 100 * index + step + 1 + batch["actions"].ravel()
        returns = np.add.reduceat(rewards, batch["starts"])
        expected += list(zip(length[batch["starts"]].tolist(), returns.tolist(), strict=True))
    found = [(info["l"], info["r"]) for info in model.ep_info_buffer]
    np.testing.assert_allclose(sorted(found), sorted(expected))

    # Idle environments are left alone only where no wrapper counts their steps
    skips_idle_envs = (base, wrapper) == ("EpisodeVecEnv", "VecTransposeImage") or (
        base != "SubprocVecEnv" and wrapper in ("bare", "VecTransposeImage_by_sb3")
    )
    n_updates, n_active, counts = np.array(steps).T
    n_stepped = np.diff(counts, prepend=0)
    np.testing.assert_array_equal(n_stepped, n_active if skips_idle_envs else 3)
    for number, batch in enumerate(batches.batches):
        logged = {name: batch["logged"][f"rollout/{name}"] for name in ("episodes", "transitions", "idle_fraction")}
        n_transitions, in_batch = len(batch["rewards"]), n_updates == number
        assert logged["episodes"] == len(batch["starts"])
        assert logged["transitions"] == n_transitions == n_active[in_batch].sum()
        assert logged["idle_fraction"] == pytest.approx(1 - n_transitions / n_stepped[in_batch].sum())


@every_base
@every_wrapper
def test_a_seed_fixes_what_is_learned(base, wrapper):
    models = []
    for _ in range(2):
        with closing(make_place_env(base, wrapper)) as env:
            models.append(make_place_model(env).learn(150))
    assert models[0]._n_updates >= 2
    assert_same_parameters(*models)


@pytest.mark.parametrize("n_envs", [1, 2, 5])
@every_wrapper
def test_an_episode_depends_on_its_number_alone(wrapper, n_envs):
    """Whatever is around an ``EpisodeVecEnv``, and however many environments share the work."""

    def run(wrapper, n_envs):
        batches, by_number = Batches(), {}
        number_of_seed = {episode_seed(0, number): number for number in range(200)}
        with closing(make_place_env("EpisodeVecEnv", wrapper, n_envs)) as env:
            # The policy must not tell environments or their numbers of episodes apart
            model = make_place_model(env, target_kl=None, learning_rate=0.0, normalize_observations=False)
            with th.no_grad():
                model.policy.mlp_extractor.policy_net[0].weight.zero_()
                model.policy.action_net.bias.copy_(th.tensor([0.0, 0.5, 1.0]))
            seeds = note_seeds(model)
            model.learn(150, callback=batches)
        for batch in batches.batches:
            for episode, actions in zip(
                np.split(place(batch["observations"]), batch["starts"][1:]),
                np.split(batch["actions"], batch["starts"][1:]),
                strict=True,
            ):
                index, which, _, length = episode[0].astype(int)
                by_number[number_of_seed[seeds[index, which]]] = (length, actions.ravel().tolist())
        return by_number

    expected, found = run("bare", 1), run(wrapper, n_envs)
    # Consecutive numbers, none of them twice
    assert sorted(found) == list(range(len(found)))
    shared = expected.keys() & found.keys()
    assert len(shared) >= 20
    assert {number: found[number] for number in shared} == {number: expected[number] for number in shared}


def note_seeds(model):
    """A dictionary that is filled with (environment, episode) -> what it is reset with."""
    seeds = {}
    for env in model.get_env().unwrapped.envs:
        env = env.unwrapped

        def reset(env=env, original=env.reset, **kwargs):
            result = original(**kwargs)
            seeds[env.index, env.episode] = kwargs.get("seed")
            return result

        env.reset = reset
    return seeds


def short_pendulum():
    return Monitor(gym.make("Pendulum-v1", max_episode_steps=10))


def short_cartpole():
    return Monitor(gym.make("CartPole-v1", max_episode_steps=20))


def learned(env, n_updates=3, callback=None, **kwargs):
    """The state of a model after some updates."""
    model = make_model(env, **kwargs)
    while model._n_updates < n_updates:
        model.learn(1, callback=callback, reset_num_timesteps=False)
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


VARIANTS = [
    pytest.param({}, id="default"),
    pytest.param(dict(baseline="linear", baseline_memory=0.0, normalize_observations=False), id="linear_baseline"),
    pytest.param(dict(policy_kwargs=dict(activation_fn=th.nn.ELU)), id="elu"),
    pytest.param(dict(use_sde=True, sde_sample_freq=4), id="gsde"),
]


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("kwargs", VARIANTS)
def test_the_same_seed_learns_the_same_in_every_way_of_acting(n_envs, kwargs):
    runs = [learned(DummyVecEnv([short_pendulum] * n_envs), seed=seed, **kwargs) for seed in (1, 1, 2)]
    assert_same(*runs[:2])
    assert not th.equal(runs[0]["log_std"], runs[2]["log_std"])


@pytest.mark.parametrize("make_env", [short_cartpole, short_pendulum])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_processes_learn_the_same_as_this_process(make_env, n_envs):
    with closing(subproc([make_env] * n_envs)) as env:
        in_processes = learned(env)
    assert_same(in_processes, learned(SteppedAsItIs([make_env] * n_envs)))


@pytest.mark.parametrize("n_envs", [1, 3])
def test_a_dummy_vec_env_learns_the_same_as_an_episode_vec_env(n_envs):
    assert_same(*(learned(cls([short_cartpole] * n_envs)) for cls in (DummyVecEnv, EpisodeVecEnv)))


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_draws_of_others_from_the_global_generators_change_nothing(kwargs):
    def draw(locals_, globals_):
        random.random(), np.random.rand(), th.rand(1)
        return True

    assert_same(*(learned(DummyVecEnv([short_pendulum] * 2), callback=callback, **kwargs) for callback in (None, draw)))


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("kwargs", VARIANTS)
def test_learning_leaves_the_global_generators_alone(n_envs, kwargs):
    model = make_model(DummyVecEnv([short_pendulum] * n_envs), **kwargs)

    def states():
        return random.getstate(), [str(part) for part in np.random.get_state()], th.get_rng_state().tolist()

    before = states()
    model.learn(30 * n_envs)
    assert model._n_updates >= 1
    assert states() == before


def test_learning_in_pieces_is_learning_in_one_piece():
    whole = make_model(DummyVecEnv([short_pendulum] * 2)).learn(160)
    assert whole._n_updates == 4
    assert_same(dict(whole.policy.state_dict()), learned(DummyVecEnv([short_pendulum] * 2), n_updates=4))


def test_without_a_seed_of_its_own_a_model_follows_the_global_seed():
    runs = []
    for seed in (0, 0, 1):
        set_random_seed(seed)
        runs.append(learned(make_vec_env(short_pendulum, n_envs=2, seed=5), seed=None))
    assert_same(*runs[:2])
    assert not th.equal(runs[0]["action_net.weight"], runs[2]["action_net.weight"])


def test_no_two_episodes_have_the_same_seed():
    first_observations = []

    def note(locals_, globals_):
        if locals_["n_steps"] == 1:
            first_observations.extend(locals_["obs"][:, 2])  # the angular velocity, random at the reset
        return True

    model = make_model(DummyVecEnv([short_pendulum] * 3), n_steps=10)
    for _ in range(3):
        model.learn(1, callback=note, reset_num_timesteps=False)
    assert len(first_observations) == len(set(first_observations)) == 9


@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_statistics_of_vec_normalize_follow_training(n_envs):
    env = VecNormalize(random_env(n_envs), clip_obs=0.5, clip_reward=0.25)
    model = make_model(env, bootstrap_timeouts=False).learn(200)
    assert model.get_vec_normalize_env() is env
    assert env.obs_rms.count > model.num_timesteps
    buffer = model.rollout_buffer
    assert np.abs(buffer.observations).max() == 0.5
    assert np.abs(buffer.rewards).max() == 0.25


def test_vec_normalize_can_be_given_some_entries_of_a_dictionary():
    space = spaces.Dict(far=spaces.Box(90, 110, (2,)), near=spaces.Box(90, 110, (2,)))
    env = VecNormalize(random_env(observation_space=space), norm_obs_keys=["near"])
    observations = make_model(env, "MultiInputPolicy").learn(100).rollout_buffer.observations
    assert np.abs(observations["near"]).max() <= 10
    assert observations["far"].min() >= 90


def test_evaluation_uses_the_statistics_that_vec_normalize_has_in_training():
    env = VecNormalize(random_env(2))
    eval_env = VecNormalize(random_env(), training=False, norm_reward=False)
    callback = EvalCallback(eval_env, eval_freq=1, n_eval_episodes=1, verbose=0)
    make_model(env).learn(60, callback=callback)
    np.testing.assert_array_equal(eval_env.obs_rms.mean, env.obs_rms.mean)
    assert eval_env.obs_rms.count == env.obs_rms.count > 60


def test_checkpoints_have_the_statistics_of_vec_normalize(tmp_path):
    env = VecNormalize(random_env())
    model = make_model(env).learn(1)
    model.learn(1, callback=CheckpointCallback(save_freq=1, save_path=tmp_path, save_vecnormalize=True))
    saved = VecNormalize.load(tmp_path / f"rl_model_vecnormalize_{model.num_timesteps}_steps.pkl", random_env())
    np.testing.assert_array_equal(saved.obs_rms.mean, env.obs_rms.mean)
    loaded = REINFORCE.load(tmp_path / f"rl_model_{model.num_timesteps}_steps", env=saved)
    assert loaded.get_vec_normalize_env() is saved
    assert loaded.learn(1)._n_updates == 2


def test_set_env_changes_which_vec_normalize_is_used():
    one, other = (VecNormalize(random_env()) for _ in range(2))
    model = make_model(one)
    model.set_env(other)
    assert model.get_vec_normalize_env() is other
    count = one.obs_rms.count
    model.learn(50)
    assert one.obs_rms.count == count
    assert other.obs_rms.count >= 50


def test_stacked_frames_begin_each_episode_with_zeros():
    model = make_model(VecFrameStack(scripted([[3, 5], [4]]), 3)).learn(1)
    buffer = model.rollout_buffer
    frames = buffer.observations.reshape(-1, 3, 3)
    steps = frames[:, -1, 2]
    assert not frames[buffer.episode_starts, :2].any()
    later = ~buffer.episode_starts
    np.testing.assert_array_equal(frames[later, 1, 2], steps[later] - 1)


SMALL_CNN = dict(features_extractor_kwargs=dict(features_dim=8))


@pytest.mark.parametrize("channels_last", [True, False])
def test_stacked_images_have_their_channels_first(channels_last):
    make_env = lambda: FakeImageEnv(screen_height=36, screen_width=36, channel_first=not channels_last)  # noqa: E731
    env = VecFrameStack(DummyVecEnv([make_env] * 2), 4, channels_order="last" if channels_last else "first")
    model = make_model(env, "CnnPolicy", policy_kwargs=SMALL_CNN).learn(1)
    assert model.rollout_buffer.observations.shape[1:] == (4, 36, 36)
    assert is_vecenv_wrapped(model.get_env(), VecTransposeImage) == channels_last


def test_the_automatic_transposition_can_be_skipped():
    """Five stacked frames of 10 channels first look like channels last."""
    make_env = lambda: FakeImageEnv(screen_height=41, screen_width=40, n_channels=10, channel_first=True)  # noqa: E731
    stacked = VecFrameStack(DummyVecEnv([make_env]), 5, channels_order="first")
    env = VecTransposeImage(stacked, skip=True)
    model = make_model(env, "CnnPolicy", policy_kwargs=SMALL_CNN).learn(1)
    assert model.get_env() is env
    assert model.rollout_buffer.observations.shape[1:] == (50, 41, 40)


def test_images_in_dictionaries_are_transposed():
    space = spaces.Dict(img=spaces.Box(0, 255, (36, 40, 3), np.uint8), vec=spaces.Box(-1, 1, (2,)))
    kwargs = dict(policy_kwargs=dict(features_extractor_kwargs=dict(cnn_output_dim=8)))
    model = make_model(RandomEnv(space, PAIR, 7), "MultiInputPolicy", **kwargs).learn(1)
    assert is_vecenv_wrapped(model.get_env(), VecTransposeImage)
    assert model.rollout_buffer.observations["img"].shape[1:] == (3, 36, 40)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_file_of_vec_monitor_has_the_episodes_of_the_batch(tmp_path, n_envs):
    with closing(VecMonitor(EpisodeVecEnv([PlaceEnv] * n_envs), str(tmp_path / "log"))) as env:
        model = make_model(env).learn(1)
    lengths = np.diff([*np.flatnonzero(model.rollout_buffer.episode_starts), len(model.rollout_buffer.rewards)]).tolist()
    with open(tmp_path / "log.monitor.csv", newline="") as file:
        next(file)
        written = [int(row["l"]) for row in csv.DictReader(file)]
    for length in lengths:
        written.remove(length)
    # What is left was run by idle environments
    assert n_envs > 1 or not written


@pytest.mark.parametrize("what", ["reward", "observation", "terminal observation"])
def test_vec_check_nan_stops_before_anything_is_learned(what):
    def spoil(name, episode, step, value):
        return value * np.nan if name == what and episode == 4 else value

    env = VecCheckNan(scripted([[5]], spoil=spoil), raise_exception=True)
    model = make_model(env, n_steps=30, seed=None)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)\bnan\b"):
        model.learn(1)
    assert_same(before, dict(model.policy.state_dict()))


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


def test_a_vec_env_of_ones_own_is_learned_from():
    model = make_model(BatchEnv(3)).learn(300)
    assert model._n_updates >= 3
    buffer = model.rollout_buffer
    starts = np.flatnonzero(buffer.episode_starts)
    assert set(np.diff([*starts, len(buffer.rewards)])) == {4, 5, 6}
    assert not buffer.observations[starts].any()
    later = ~buffer.episode_starts
    moves = np.diff(buffer.observations.ravel())[later[1:]]
    np.testing.assert_allclose(moves, buffer.actions.ravel().clip(-1, 1)[:-1][later[1:]], atol=1e-6)
