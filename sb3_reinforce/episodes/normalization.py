"""Running statistics of observations, kept with the policy."""

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

#: Observations pass through networks in chunks for which a layer takes or returns about so many numbers: what the layers of a
#: CNN return then stays in the processor's cache, and takes no memory to speak of.
CHUNK = 2_000_000


class ObservationNormalizer(nn.Module):
    """
    Shift and scale vector observations to mean 0 and standard deviation 1, with running statistics kept in buffers.

    Only ``Box`` observations that are not images are normalized; for a ``Dict`` space, each such entry by itself. The
    statistics change in :meth:`update` alone. Clipping and the constants are those of SB3's ``VecNormalize``.

    :param observation_space: observation space of the policy
    """

    #: Bound of the absolute value of what is returned, in standard deviations
    clip = 10.0
    #: Added to the variance, so that an entry that never changes does not divide by zero
    eps = 1e-8

    def __init__(self, observation_space: spaces.Space):
        super().__init__()
        entries = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        self.keys = [key for key, space in entries.items() if isinstance(space, spaces.Box) and not is_image_space(space)]
        # Names of buffers must not hold dots: entries are named by their position
        for position, key in enumerate(self.keys):
            # SB3's epsilon gives the initial mean of 0 a weight, which dwarfs the variance of observations far from 0
            initial = RunningMeanStd(epsilon=0.0, shape=entries[key].shape or ())
            for name in ("mean", "var", "count"):
                value = th.as_tensor(getattr(initial, name), dtype=th.float64)
                self.register_buffer(f"{name}_{position}", value)

    def _statistics(self, key: str) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        return tuple(getattr(self, f"{name}_{self.keys.index(key)}") for name in ("mean", "var", "count"))

    def forward(self, observations: PyTorchObs) -> PyTorchObs:
        """Normalize the vector entries of (batch, ...) observations as the environment returns them, into float32."""
        if isinstance(observations, dict):
            return {key: self._normalize(key, obs) if key in self.keys else obs for key, obs in observations.items()}
        return self._normalize("", observations) if self.keys else observations

    def _normalize(self, key: str, observations: th.Tensor) -> th.Tensor:
        # Subtract in the precision of the observation: in float32, a large mean would leave nothing of a small difference
        dtype = th.float32 if observations.dtype == th.float32 else th.float64
        mean, std = self.shift_and_scale(key)
        return (observations.to(dtype) - mean.to(dtype)).div_(std.to(dtype)).clamp_(-self.clip, self.clip).float()

    def shift_and_scale(self, key: str) -> tuple[th.Tensor, th.Tensor]:
        """What is subtracted from an entry of an observation, and what it is then divided by, in float64."""
        mean, var, _ = self._statistics(key)
        return mean, th.sqrt(var + self.eps)

    def update(self, observations: np.ndarray | dict[str, np.ndarray]) -> None:
        """Merge (n_transitions, ...) raw observations into the statistics, a dictionary of these for Dict spaces."""
        for key in self.keys:
            running = RunningMeanStd()
            buffers = self._statistics(key)
            running.mean, running.var, count = (buffer.cpu().numpy() for buffer in buffers)
            running.count = float(count)
            batch = observations[key] if isinstance(observations, dict) else observations
            # In chunks, of which there are copies in float64
            size = max(1, CHUNK // max(1, batch[0].size))
            for start in range(0, len(batch), size):
                running.update(batch[start : start + size].astype(np.float64))
            if not np.isfinite(running.var).all():
                raise ValueError(f"The observations {key!r} are so large that their variance is not finite: scale them down")
            for buffer, value in zip(buffers, (running.mean, running.var, running.count), strict=True):
                buffer.copy_(th.as_tensor(value))


def normalizer_of(policy: BasePolicy) -> ObservationNormalizer | None:
    """What normalizes the observations of a policy, None if nothing does."""
    normalizer = getattr(policy, "observation_normalizer", None)
    return normalizer if isinstance(normalizer, ObservationNormalizer) and normalizer.keys else None
