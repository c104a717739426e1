"""Environments that notice each reset, and episodes of very different lengths."""

from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import RecordVideo
from stable_baselines3 import A2C
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE
from tests.runs.common import Batches


def n_frames(folder: Path) -> list[int]:
    """Return the number of frames of each video, in the order of the episodes."""
    videos = sorted(folder.glob("**/*.mp4"), key=lambda path: int(path.stem.split("-")[-1]))
    return [int(cv2.VideoCapture(str(video)).get(cv2.CAP_PROP_FRAME_COUNT)) for video in videos]


@pytest.mark.parametrize("algorithm", [REINFORCE, A2C])
def test_record_video_makes_one_video_per_episode(tmp_path: Path, algorithm: Any):
    lengths: list[int] = []

    class Lengths(gym.Wrapper):
        def reset(self, **kwargs: Any) -> Any:
            lengths.append(0)
            return super().reset(**kwargs)

        def step(self, action: Any) -> Any:
            lengths[-1] += 1
            return super().step(action)

    env = Lengths(gym.make("CartPole-v1", render_mode="rgb_array", max_episode_steps=15))
    # MoviePy may lose a frame to rounding at other rates
    env = RecordVideo(env, str(tmp_path / "videos"), episode_trigger=lambda episode: True, fps=64)
    model = algorithm("MlpPolicy", env, n_steps=20, seed=0)
    for _ in range(2):
        model.learn(20, reset_num_timesteps=False)
    n_ended = len(model.ep_info_buffer)
    env.close()
    # One frame before the first step, and one after each
    assert n_frames(tmp_path) == [length + 1 for length in lengths]
    assert n_ended >= 2
    # A2C begins the next episode as soon as one has ended
    assert len(lengths) == n_ended + (algorithm is A2C)


class FiveOrHundred(gym.Env):
    """An episode has 5 or 100 steps with equal probability."""

    observation_space = spaces.Box(0, 1, (1,))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.remaining = 5 if self.np_random.random() < 0.5 else 100
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.remaining -= 1
        return np.zeros(1, np.float32), 1.0, self.remaining == 0, False, {}


def z_score(lengths: list[int]) -> float:
    """Standard errors between the mean of independent lengths and 52.5."""
    return float((np.mean(lengths) - 52.5) / (47.5 / np.sqrt(len(lengths))))


@pytest.mark.parametrize("seed", [0, 10])
def test_batches_are_not_biased_towards_short_episodes(seed: int):
    """Batches are small compared to episodes, where the bias would be large."""
    batches, kwargs = Batches(), dict(n_steps=20, n_episodes=None, baseline=None)
    REINFORCE("MlpPolicy", DummyVecEnv([FiveOrHundred] * 4), seed=seed, **kwargs).learn(15_000, callback=batches)  # type: ignore[arg-type]
    lengths = [len(episode) for episode in batches.episodes()]
    assert len(lengths) >= 100 and abs(z_score(lengths)) < 3
