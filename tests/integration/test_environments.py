"""Environments that notice each reset: recorders, data sets, and the files of the monitors."""

import csv
from contextlib import closing

import cv2
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import RecordVideo
from stable_baselines3 import A2C
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecVideoRecorder

from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv
from tests.envs import subproc
from tests.integration.common import Batches


def record(env, folder):
    # Of other rates, as CartPole's 50, MoviePy may lose a frame to rounding
    return RecordVideo(env, str(folder / "videos"), episode_trigger=lambda episode: True, fps=64)


def n_frames(folder):
    """Number of frames of each video, in the order of the episodes."""
    videos = sorted(folder.glob("**/*.mp4"), key=lambda path: int(path.stem.split("-")[-1]))
    return [int(cv2.VideoCapture(str(video)).get(cv2.CAP_PROP_FRAME_COUNT)) for video in videos]


@pytest.mark.parametrize("algorithm", [REINFORCE, A2C])
@pytest.mark.parametrize("seed", [None, 0])
def test_record_video_makes_one_video_an_episode(tmp_path, algorithm, seed):
    lengths = []

    class Lengths(gym.Wrapper):
        """Below the recorder: what it is to see."""

        def reset(self, **kwargs):
            lengths.append(0)
            return super().reset(**kwargs)

        def step(self, action):
            lengths[-1] += 1
            return super().step(action)

    env = record(Lengths(gym.make("CartPole-v1", render_mode="rgb_array", max_episode_steps=15)), tmp_path)
    model = algorithm("MlpPolicy", env, n_steps=20, seed=seed)
    # With one call of learn() for each batch, as people do who evaluate in between
    for _ in range(2):
        model.learn(20, reset_num_timesteps=False)
    n_ended = len(model.ep_info_buffer)
    env.close()
    # One frame before the first step, and one after each
    assert n_frames(tmp_path) == [length + 1 for length in lengths]
    assert n_ended >= 2
    if algorithm is REINFORCE:
        assert len(lengths) == n_ended and min(lengths) > 1
    else:
        # A2C begins another episode as soon as one has ended
        assert len(lengths) == n_ended + 1


def test_vec_video_recorder_records_training(tmp_path):
    env = DummyVecEnv([lambda: gym.make("CartPole-v1", render_mode="rgb_array")] * 2)
    env = VecVideoRecorder(env, str(tmp_path), record_video_trigger=lambda step: step == 5, video_length=20)
    with closing(env):
        REINFORCE("MlpPolicy", env, n_steps=40, seed=0).learn(1)
    (video,) = tmp_path.glob("*.mp4")
    assert cv2.VideoCapture(str(video)).get(cv2.CAP_PROP_FRAME_COUNT) == 21


class Dataset(gym.Env):
    """Each ``reset()`` takes the next sample, whose number is the observation; an episode is a look or two at it."""

    observation_space = spaces.Box(0, np.inf, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, n_looks=1):
        self.n_looks = n_looks
        self.sample = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sample += 1
        self.looks = 0
        return np.array([self.sample], np.float32), {}

    def step(self, action):
        self.looks += 1
        return np.array([self.sample], np.float32), float(action), self.looks == self.n_looks, False, {}


@pytest.mark.parametrize("make_vec_env", [None, DummyVecEnv, EpisodeVecEnv])
@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("limit", [dict(n_steps=7), dict(n_episodes=5)], ids=str)
def test_no_sample_of_a_data_set_is_skipped(make_vec_env, seed, limit):
    batches = Batches()
    env = Dataset(2) if make_vec_env is None else make_vec_env([lambda n_looks=n: Dataset(n_looks) for n in (1, 2, 3)])
    model = REINFORCE("MlpPolicy", env, seed=seed, **limit)
    # In one go, in pieces, and from the beginning again
    model.learn(100, callback=batches)
    for reset_num_timesteps in (False, False, True, True):
        model.learn(1, callback=batches, reset_num_timesteps=reset_num_timesteps)
    seen = np.concatenate([episode[0] for episode in batches.episodes()]).astype(int)
    # Each environment has a data set of its own
    expected = [np.arange(member.unwrapped.sample + 1) for member in model.get_env().envs]
    np.testing.assert_array_equal(sorted(seen), sorted(np.concatenate(expected)))
    assert len(seen) >= 40


@pytest.mark.parametrize("algorithm", [REINFORCE, A2C])
def test_an_evaluation_in_between_takes_its_own_samples_of_a_data_set(algorithm):
    env = DummyVecEnv([Dataset])
    model = algorithm("MlpPolicy", env, n_steps=5, seed=0).learn(5)
    after_learning = env.envs[0].sample
    # A2C has begun the next episode
    assert after_learning == (4 if algorithm is REINFORCE else 5)
    evaluate_policy(model, env, n_eval_episodes=3, warn=False)
    # evaluate_policy() resets at its beginning, and after each of its episodes
    assert env.envs[0].sample == after_learning + 4


class FiveOrHundred(gym.Env):
    """An episode has 5 steps or 100, as likely as each other."""

    observation_space = spaces.Box(0, 1, (1,))
    action_space = spaces.Discrete(2)
    n_resets = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n_resets += 1
        self.remaining = 5 if self.np_random.random() < 0.5 else 100
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.remaining -= 1
        return np.zeros(1, np.float32), 1.0, self.remaining == 0, False, {}


def monitored_lengths(path):
    with open(path, newline="") as file:
        next(file)
        return [int(row["l"]) for row in csv.DictReader(file)]


def z_score(lengths):
    """By how many standard errors the mean of independent lengths is off 52.5."""
    return (np.mean(lengths) - 52.5) / (47.5 / np.sqrt(len(lengths)))


@pytest.mark.parametrize("make_vec_env", [DummyVecEnv, EpisodeVecEnv, subproc])
@pytest.mark.parametrize("seed", [0, 10])
def test_neither_the_batches_nor_the_monitor_files_are_biased_towards_short_episodes(tmp_path, make_vec_env, seed):
    """Statistical, with fixed seeds. Batches are short in comparison to the episodes, where a bias would be large."""
    batches = Batches()

    def make(index):
        return Monitor(FiveOrHundred(), str(tmp_path / str(index)))

    with closing(make_vec_env([lambda index=index: make(index) for index in range(4)])) as env:
        model = REINFORCE("MlpPolicy", env, n_steps=20, seed=seed, baseline=None, stats_window_size=10**6)
        model.learn(20_000, callback=batches)
        n_resets = np.array(env.get_attr("n_resets"))
    learned_from = [len(episode) for episode in batches.episodes()]
    of_each = [monitored_lengths(tmp_path / f"{index}.monitor.csv") for index in range(4)]
    written = [length for lengths in of_each for length in lengths]
    assert len(learned_from) >= 150
    assert abs(z_score(learned_from)) < 3
    assert abs(z_score(written)) < 3
    assert sorted(info["l"] for info in model.ep_info_buffer) == sorted(learned_from)
    n_unfinished = n_resets - [len(lengths) for lengths in of_each]
    if make_vec_env is not subproc:
        assert sorted(written) == sorted(learned_from)
        assert not n_unfinished.any()
        return
    # Processes are stepped along while they are idle: what they end then is in the files alone. No episode is given up
    for length in learned_from:
        written.remove(length)
    assert len(written) > 0
    assert n_unfinished.max() <= 1


def test_a_collector_that_drops_unfinished_episodes_would_be_found_out():
    """The bound above is one that such a collector misses."""
    rng = np.random.default_rng(0)
    kept = []
    for _ in range(250):
        for _ in range(4):
            length = rng.choice([5, 100])
            steps = 0
            while steps + length <= 80:
                kept.append(length)
                steps += length
                length = rng.choice([5, 100])
    assert z_score(kept) < -10
