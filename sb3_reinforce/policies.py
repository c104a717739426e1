"""
Policies for REINFORCE: SB3's actor-critic policies with a closed-form baseline in the place of the critic.

In SB3 the value of a state is a linear layer (``value_net``) on what the critic branch of ``mlp_extractor`` makes of the
features. Here that branch is a fixed feature map and the linear layer a
:class:`~sb3_reinforce.baselines.LinearBaseline`, so that ``predict_values``, saving, loading and devices are SB3's own.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel, BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    MlpExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_reinforce.baselines import FEATURE_MAPS, LinearBaseline

#: Observations pass through networks in chunks for which a layer takes or returns about so many numbers: what the layers of a
#: CNN return then stays in the processor's cache, and takes no memory to speak of.
_CHUNK = 2_000_000


class ObservationNormalizer(nn.Module):
    """
    Shift and scale vector observations to mean 0 and standard deviation 1, with running statistics kept in buffers.

    Only ``Box`` observations that are not images are normalised; for a ``Dict`` space, each such entry by itself. The
    statistics change in :meth:`update` alone. Clipping and the constants are those of SB3's ``VecNormalize``.

    :param observation_space: observation space of the policy
    :param clip: bound of the absolute value of what is returned, in standard deviations
    :param eps: added to the variance, so that an entry that never changes does not divide by zero
    """

    def __init__(self, observation_space: spaces.Space, clip: float = 10.0, eps: float = 1e-8):
        super().__init__()
        self.clip = clip
        self.eps = eps
        entries = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        self.keys = [key for key, space in entries.items() if isinstance(space, spaces.Box) and not is_image_space(space)]
        for key in self.keys:
            initial = RunningMeanStd(shape=entries[key].shape or ())
            for name in ("mean", "var", "count"):
                value = th.as_tensor(getattr(initial, name), dtype=th.float64)
                self.register_buffer(f"{name}_{self._slug(key)}", value)

    def _slug(self, key: str) -> str:
        """Buffer names must not hold dots: name entries by their position in the space."""
        return str(self.keys.index(key))

    def _statistics(self, key: str) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        return tuple(getattr(self, f"{name}_{self._slug(key)}") for name in ("mean", "var", "count"))

    def forward(self, observations: PyTorchObs) -> PyTorchObs:
        """
        :param observations: (batch, ...) as SB3's ``preprocess_obs`` returns them, a dictionary of these for Dict spaces
        :return: the same, with the vector entries normalised
        """
        if isinstance(observations, dict):
            return {key: self._normalize(key, obs) if key in self.keys else obs for key, obs in observations.items()}
        return self._normalize("", observations) if self.keys else observations

    def _normalize(self, key: str, observations: th.Tensor) -> th.Tensor:
        mean, std = self.shift_and_scale(key, observations.dtype)
        return th.clamp((observations - mean) / std, -self.clip, self.clip)

    def shift_and_scale(self, key: str, dtype: th.dtype) -> tuple[th.Tensor, th.Tensor]:
        """
        :param key: an entry of a Dict space that is normalised, or the empty string
        :param dtype: of the result
        :return: what is subtracted from an observation, and what it is then divided by
        """
        mean, var, _ = self._statistics(key)
        return mean.to(dtype), th.sqrt(var + self.eps).to(dtype)

    def update(self, observations: np.ndarray | dict[str, np.ndarray]) -> None:
        """
        Merge the raw observations of one batch into the statistics.

        :param observations: (n_transitions, ...), a dictionary of these for Dict spaces; finite
        """
        for key in self.keys:
            running = RunningMeanStd()
            buffers = self._statistics(key)
            running.mean, running.var, count = (buffer.cpu().numpy() for buffer in buffers)
            running.count = float(count)
            running.update(np.asarray(observations[key] if isinstance(observations, dict) else observations, np.float64))
            for buffer, value in zip(buffers, (running.mean, running.var, running.count), strict=True):
                buffer.copy_(th.as_tensor(value))


class NormalizedExtractor(BaseFeaturesExtractor):
    """
    A features extractor that normalises the observations first.

    :param normalizer: what normalises the observations; may be shared between extractors
    :param extractor: the features extractor that sees them
    """

    def __init__(self, normalizer: ObservationNormalizer, extractor: BaseFeaturesExtractor):
        super().__init__(extractor._observation_space, extractor.features_dim)
        self.normalizer: ObservationNormalizer = normalizer
        self.extractor = extractor

    def forward(self, observations: PyTorchObs) -> th.Tensor:
        return self.extractor(self.normalizer(observations))


class MlpPolicy(ActorCriticPolicy):
    """
    A stochastic policy on vector observations with a closed-form state-value baseline.

    Continuous actions have a Gaussian with a state-independent standard deviation that is learned with the mean. All
    parameters of SB3's ``ActorCriticPolicy`` are accepted; those whose default or meaning differs, and the new ones, are:

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: hidden layers of the actor, e.g. ``[64, 64]`` (or ``dict(pi=[64, 64])``). Default: ``[64, 64]``, or none
        behind a CNN. The baseline has no hidden layers: a ``vf`` entry is ignored with a warning
    :param activation_fn: Activation function of the actor, ReLU by default
    :param ortho_init: True (default) for SB3's orthogonal initialisation; False for Glorot-uniform weights and zero biases
        in the actor
    :param log_std_init: Initial value for the log standard deviation. Much noise may hide what the mean achieves; with little,
        exploration may end before it has begun
    :param optimizer_kwargs: as in SB3, but Adam keeps PyTorch's ``eps=1e-8`` (SB3 sets 1e-5)
    :param baseline: feature map of the baseline: "linear" (the features themselves), "quadratic" (and their squares),
        "random" (and fixed random tanh units of them), or None for no baseline
    :param baseline_memory: in [0, 1), weight of earlier batches in the fit of the baseline; 0 fits the latest batch alone
    :param normalize_observations: whether to normalise vector observations with running statistics
    :param kwargs: other parameters of SB3's ``ActorCriticPolicy``
    """

    default_features_extractor: type[BaseFeaturesExtractor] = FlattenExtractor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        ortho_init: bool = True,
        log_std_init: float = -0.75,
        optimizer_kwargs: dict[str, Any] | None = None,
        baseline: str | None = "random",
        baseline_memory: float = 0.85,
        normalize_observations: bool = True,
        **kwargs: Any,
    ):
        kwargs.setdefault("features_extractor_class", self.default_features_extractor)
        if net_arch is None:
            net_arch = [] if kwargs["features_extractor_class"] == NatureCNN else [64, 64]
        if isinstance(net_arch, dict):
            if net_arch.get("vf"):
                warnings.warn(
                    f"net_arch={net_arch}: 'vf' is ignored, the baseline has no hidden layers (see `baseline`)", stacklevel=2
                )
            net_arch = net_arch.get("pi", [])
        self.baseline = baseline
        self.baseline_memory = baseline_memory
        self.normalize_observations = normalize_observations
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=net_arch,
            activation_fn=activation_fn,
            ortho_init=ortho_init,
            log_std_init=log_std_init,
            optimizer_kwargs={} if optimizer_kwargs is None else optimizer_kwargs,
            **kwargs,
        )

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        extractor = super().make_features_extractor()
        if not self.normalize_observations:
            return extractor
        if not hasattr(self, "observation_normalizer"):
            self.observation_normalizer = ObservationNormalizer(self.observation_space)
        return NormalizedExtractor(self.observation_normalizer, extractor)

    def _build_mlp_extractor(self) -> None:
        assert isinstance(self.net_arch, list)
        self.mlp_extractor = MlpExtractor(
            self.features_dim, net_arch=dict(pi=self.net_arch), activation_fn=self.activation_fn, device=self.device
        )
        feature_map, _ = FEATURE_MAPS[self.baseline or "linear"]
        if feature_map is not None:
            self.mlp_extractor.value_net = feature_map(self.features_dim)  # type: ignore[assignment]
            self.mlp_extractor.latent_dim_vf = self.mlp_extractor.value_net.out_features  # type: ignore[assignment]

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        install_baseline(self, self.baseline, self.baseline_memory)
        if not self.ortho_init:
            for module in (self.mlp_extractor.policy_net, self.action_net):
                module.apply(_init_glorot)
        # Built anew because SB3's optimiser also holds the parameters of the value layer that the baseline has replaced
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            baseline=self.baseline,
            baseline_memory=self.baseline_memory,
            normalize_observations=self.normalize_observations,
            share_features_extractor=self.share_features_extractor,
        )
        return data


class CnnPolicy(MlpPolicy):
    """:class:`MlpPolicy` for images: the features are those of SB3's ``NatureCNN``."""

    default_features_extractor = NatureCNN


class MultiInputPolicy(MlpPolicy):
    """:class:`MlpPolicy` for dictionary observations: the features are those of SB3's ``CombinedExtractor``."""

    default_features_extractor = CombinedExtractor


def _init_glorot(module: nn.Module) -> None:
    """Glorot-uniform weights and zero biases (Glorot & Bengio, 2010), the default of Keras and so the article's."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def install_baseline(policy: ActorCriticPolicy, baseline: str | None, memory: float) -> None:
    """
    Put a closed-form linear baseline in the place of a policy's value layer.

    :param policy: the policy; the critic branch of its ``mlp_extractor`` is the feature map
    :param baseline: decides how strongly the fit is regularised: no less than for random features where features are learned,
        many of which are as good as dead
    :param memory: see :class:`~sb3_reinforce.baselines.LinearBaseline`
    """
    _, ridge = FEATURE_MAPS[baseline or "linear"]
    learned = any(True for _ in policy.vf_features_extractor.parameters())
    if learned:
        ridge = max(ridge, FEATURE_MAPS["random"][1])
    policy.value_net = LinearBaseline(policy.mlp_extractor.latent_dim_vf, ridge, memory, truncate=learned)  # type: ignore[assignment]


def chunk_size(policy: BasePolicy) -> int:
    """
    How many observations a policy should be shown at a time. The gradient of a batch is the sum of those of its chunks,
    except with batch normalisation, which has to see all of a batch at once.

    :param policy: the policy
    :return: number of observations, at least 1
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in policy.modules()):
        return sys.maxsize
    widths = [module.out_features for module in policy.modules() if isinstance(module, nn.Linear)]
    return max(1, _CHUNK // max(spaces.flatdim(policy.observation_space), *widths))


def baseline_features(policy: ActorCriticPolicy, observations: Iterable[PyTorchObs]) -> np.ndarray:
    """
    What the baseline of a policy is linear in, for a batch of observations, without gradients.

    :param policy: the policy, in evaluation mode
    :param observations: (n, ...) tensors, or dictionaries of these: the batch in chunks
    :return: (n_transitions, n_features) float32
    """
    features = []
    with th.no_grad():
        for obs in observations:
            # As in SB3's predict_values
            extracted = BaseModel.extract_features(policy, obs, policy.vf_features_extractor)
            features.append(policy.mlp_extractor.forward_critic(extracted).cpu().numpy())
    return np.concatenate(features)


@contextmanager
def baseline_inputs(policy: ActorCriticPolicy) -> Iterator[list[np.ndarray]]:
    """
    Keep what the baseline is asked about for a while: whoever evaluates actions extracts its features, too.

    :param policy: the policy
    :return: list that is filled with (batch, n_features) arrays, one for each call of the baseline
    """
    kept: list[np.ndarray] = []
    handle = policy.value_net.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach().cpu().numpy()))
    try:
        yield kept
    finally:
        handle.remove()
