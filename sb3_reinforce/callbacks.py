"""Callbacks: a progress bar that knows of environments which are left alone, and one that keeps the best policy."""

import math
from copy import deepcopy

from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback
from stable_baselines3.common.utils import safe_mean


class KeepBest(BaseCallback):
    """
    At the end of training, gives the model the policy with which the mean return of the latest episodes was highest.

    These are the episodes of ``rollout/ep_rew_mean``, as many as ``stats_window_size``: no environment is evaluated. A mean
    over fewer does not count, so that a model that has not seen so many stays as it is. The optimiser is left alone, too: give
    this callback to the last call of ``learn()``, not to those that are continued.
    """

    def _on_training_start(self) -> None:
        self.best = -math.inf
        self._policy: dict | None = None

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        episodes = self.model.ep_info_buffer
        if episodes is None or len(episodes) < self.model._stats_window_size:
            return
        mean = float(safe_mean([episode["r"] for episode in episodes]))
        if mean > self.best:
            self.best = mean
            self._policy = deepcopy(self.model.policy.state_dict())

    def _on_training_end(self) -> None:
        if self._policy is not None:
            self.model.policy.load_state_dict(self._policy)


class StepsProgressBar(ProgressBarCallback):
    """SB3's progress bar, moved by the steps that were taken: not every member of an ``EpisodeVecEnv`` takes each one."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._n_shown: int = self.model.num_timesteps

    def _on_step(self) -> bool:
        self.pbar.update(self.num_timesteps - self._n_shown)
        self._n_shown = self.num_timesteps
        return True
