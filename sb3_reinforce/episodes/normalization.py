"""Running statistics of observations, saved with the policy."""

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

#: Numbers that a layer takes or returns per chunk of a batch: CNN activations stay in the processor's cache
CHUNK = 2_000_000


class ObservationNormalizer(nn.Module):
    """Normalize vectors, also those in dictionaries, to mean 0 and standard deviation 1, like SB3's ``VecNormalize``."""

    count_0: th.Tensor
    #: Absolute bound of normalized observations, and what is added to their variance
    clip, eps = 10.0, 1e-8

    def __init__(self, observation_space: spaces.Space):
        super().__init__()
        entries = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        self.keys = [key for key, space in entries.items() if isinstance(space, spaces.Box) and not is_image_space(space)]
        # Names of buffers must not contain dots: entries are named by position
        for position, key in enumerate(self.keys):
            # SB3's default epsilon gives weight to the initial mean of 0
            initial = RunningMeanStd(epsilon=0.0, shape=entries[key].shape or ())
            for name in ("mean", "var", "count"):
                self.register_buffer(f"{name}_{position}", th.as_tensor(getattr(initial, name), dtype=th.float64))

    def statistics(self, key: str = "") -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Mean, variance and count of an entry, in float64."""
        return tuple(getattr(self, f"{name}_{self.keys.index(key)}") for name in ("mean", "var", "count"))

    def forward(self, observations: PyTorchObs) -> PyTorchObs:
        """Normalize (batch, ...) observations of the environment to float32."""
        if isinstance(observations, dict):
            return {key: self._normalize(key, obs) if key in self.keys else obs for key, obs in observations.items()}
        return self._normalize("", observations) if self.keys else observations

    def _normalize(self, key: str, observations: th.Tensor) -> th.Tensor:
        # Subtract in the observation's precision: float32 loses small differences of large numbers
        dtype = th.float32 if observations.dtype == th.float32 else th.float64
        mean, std = self.statistics(key)[0].to(dtype), th.sqrt(self.statistics(key)[1] + self.eps).to(dtype)
        return (observations.to(dtype) - mean).div_(std).clamp_(-self.clip, self.clip).float()

    def update(self, observations: np.ndarray | dict[str, np.ndarray]) -> None:
        """Merge (n_transitions, ...) observations of the environment into the statistics."""
        for key in self.keys:
            running, buffers = RunningMeanStd(), self.statistics(key)
            running.mean, running.var, count = (buffer.cpu().numpy() for buffer in buffers)
            running.count = float(count)
            batch = observations[key] if isinstance(observations, dict) else observations
            running.update(batch.astype(np.float64))
            if not np.isfinite(running.var).all():
                raise ValueError(f"The variance of observations{f' {key!r}' if key else ''} is not finite: scale them down")
            for buffer, value in zip(buffers, (running.mean, running.var, running.count), strict=True):
                buffer.copy_(th.as_tensor(value))
