"""A progress bar that knows of environments which are left alone."""

from stable_baselines3.common.callbacks import ProgressBarCallback


class StepsProgressBar(ProgressBarCallback):
    """SB3's progress bar, moved by the steps that were taken: not every member of an ``EpisodeVecEnv`` takes each one."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._n_shown: int = self.model.num_timesteps

    def _on_step(self) -> bool:
        self.pbar.update(self.num_timesteps - self._n_shown)
        self._n_shown = self.num_timesteps
        return True
