"""A reaching task with a cost of actions: to a random goal in the plane, in 50 steps."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Reaching(gym.Env):
    """A point moves by a tenth of its action. The reward is minus its distance to the goal and its squared action."""

    observation_space = spaces.Box(-10, 10, (4,))
    action_space = spaces.Box(-1, 1, (2,))

    def __init__(self, render_mode: None = None):
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.position = np.clip(self.position + 0.1 * np.clip(action, -1, 1), -2, 2)
        reward = -np.linalg.norm(self.position - self.goal) - np.square(action).sum()
        return self._observe(), float(reward), False, False, {}

    def _observe(self) -> np.ndarray:
        return np.concatenate([self.position, self.goal]).astype(np.float32)


gym.register("Reaching-v0", "benchmarks.reaching:Reaching", max_episode_steps=50)
