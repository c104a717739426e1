"""
Policies for REINFORCE: SB3's actor-critic policies with a closed-form baseline in the place of the critic.

In SB3 the value of a state is a linear layer (``value_net``) on what the critic branch of ``mlp_extractor`` makes of the
features. Here that branch is a fixed feature map and the linear layer a :class:`~sb3_reinforce.baselines.LinearBaseline`.
"""

import sys
import warnings
from typing import Any, Literal

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    MlpExtractor,
    NatureCNN,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_reinforce.baselines import FEATURE_MAPS, ActionValues, LinearBaseline, NoBaseline
from sb3_reinforce.episodes.normalization import CHUNK, ObservationNormalizer, normalizer_of

BaselineName = Literal["linear", "quadratic", "random_features"]


class MlpPolicy(ActorCriticPolicy):
    """
    A stochastic policy on vector observations with a closed-form state-value baseline.

    Continuous actions have a Gaussian with a state-independent standard deviation that is learned with the mean. All
    parameters of SB3's ``ActorCriticPolicy`` are accepted; those whose default or meaning differs, and the new ones, are:

    :param net_arch: hidden layers of the actor, e.g. ``[64, 64]`` (or ``dict(pi=[64, 64])``). Default: ``[64, 64]``, or none
        behind a CNN. The baseline has no hidden layers: a ``vf`` entry is ignored with a warning
    :param activation_fn: Activation function of the actor
    :param ortho_init: True (default) for SB3's orthogonal initialization; False for Glorot-uniform weights and zero biases
        in the actor
    :param log_std_init: Initial value for the log standard deviation. Much noise may hide what the mean achieves; with little,
        exploration may end before it has begun
    :param optimizer_kwargs: as in SB3, but Adam keeps PyTorch's ``eps=1e-8`` (SB3 sets 1e-5)
    :param baseline: see ``REINFORCE``, as the three parameters that follow
    :param action_values: Whether there is a critic of action values beside the baseline
    """

    default_features_extractor: type[BaseFeaturesExtractor] = FlattenExtractor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.Tanh,
        ortho_init: bool = True,
        log_std_init: float = 0.5,
        optimizer_kwargs: dict[str, Any] | None = None,
        baseline: BaselineName | None = "random_features",
        baseline_memory: float = 0.6,
        baseline_kwargs: dict[str, Any] | None = None,
        normalize_observations: bool = True,
        action_values: bool = False,
        **kwargs: Any,
    ):
        kwargs.setdefault("features_extractor_class", self.default_features_extractor)
        if net_arch is None:
            net_arch = [] if kwargs["features_extractor_class"] == NatureCNN else [64, 64]
        self.baseline = baseline
        self.baseline_memory = baseline_memory
        self.baseline_kwargs = baseline_kwargs or {}
        self.normalize_observations = normalize_observations
        self.action_values = action_values
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

    def _build_mlp_extractor(self) -> None:
        arch = self.net_arch
        if isinstance(arch, dict):
            if arch.get("vf"):
                warnings.warn(
                    f"net_arch={arch}: 'vf' is ignored, the baseline has no hidden layers (see `baseline`)", stacklevel=2
                )
            arch = arch.get("pi", [])
        self.mlp_extractor = MlpExtractor(
            self.features_dim, net_arch=dict(pi=arch), activation_fn=self.activation_fn, device=self.device
        )
        feature_map, _ = FEATURE_MAPS[self.baseline or "linear"]
        if feature_map is not None:
            kwargs = {key: value for key, value in self.baseline_kwargs.items() if key != "ridge"}
            critic: Any = feature_map(self.features_dim, **kwargs)
            self.mlp_extractor.value_net, self.mlp_extractor.latent_dim_vf = critic, critic.out_features

    def _build(self, lr_schedule: Schedule) -> None:
        if self.normalize_observations:
            self.observation_normalizer = ObservationNormalizer(self.observation_space)
        super()._build(lr_schedule)
        if not self.ortho_init:
            for module in (self.mlp_extractor.policy_net, self.action_net):
                module.apply(_init_glorot)
        # Last, so that their random projections do not change what the actor begins with
        install_critics(self, self.baseline, self.baseline_memory, self.baseline_kwargs, self.action_values)
        # SB3's optimizer also holds the parameters of the value layer that the baseline has replaced
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _normalize(self, obs: PyTorchObs) -> PyTorchObs:
        return self.observation_normalizer(obs) if self.normalize_observations else obs

    # SB3's get_distribution() and predict_values() do not call extract_features()
    def extract_features(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        return super().extract_features(self._normalize(obs), features_extractor)

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        return super().get_distribution(self._normalize(obs))

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        return super().predict_values(self._normalize(obs))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = ("baseline", "baseline_memory", "baseline_kwargs", "normalize_observations", "action_values")
        names = (*own, "share_features_extractor")
        return {**super()._get_constructor_parameters(), **{name: getattr(self, name) for name in names}}


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


def install_critics(
    policy: ActorCriticPolicy,
    baseline: str | None,
    memory: float,
    kwargs: dict[str, Any] | None = None,
    action_values: bool = False,
) -> None:
    """
    Put a closed-form linear baseline in the place of a policy's value layer. The arguments are those of ``REINFORCE``.

    :param policy: the policy; the critic branch of its ``mlp_extractor`` is the feature map
    :param action_values: whether the policy also gets an ``action_value_net``, on the same features and the action
    """
    if baseline is None:
        policy.value_net = NoBaseline()  # type: ignore[assignment]
        return
    # Many of the features that are learned are as good as dead, so that the fit needs a ridge
    learned = any(True for _ in policy.vf_features_extractor.parameters())
    _, ridge = FEATURE_MAPS["random_features" if learned else baseline]
    ridge = (kwargs or {}).get("ridge", ridge)
    critic = LinearBaseline(policy.mlp_extractor.latent_dim_vf, ridge, memory, truncate=learned)
    policy.value_net = critic  # type: ignore[assignment]
    if action_values:
        policy.action_value_net = ActionValues(
            critic.n_features, policy.action_space, policy.squash_output, ridge=ridge, memory=memory, truncate=learned
        )


def action_values_of(policy: BasePolicy) -> ActionValues | None:
    """The critic of action values of a policy, None if it has none."""
    critic = getattr(policy, "action_value_net", None)
    return critic if isinstance(critic, ActionValues) else None


def chunk_size(policy: BasePolicy) -> int:
    """
    How many observations a policy should be shown at a time. The gradient of a batch is the sum of those of its chunks,
    except with batch normalization, which has to see all of a batch at once.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in policy.modules()):
        return sys.maxsize
    widths = [module.out_features for module in policy.modules() if isinstance(module, nn.Linear)]
    # Normalizing takes copies of the observations
    n_copies = 4 if normalizer_of(policy) is not None else 1
    return max(1, CHUNK // max(n_copies * spaces.flatdim(policy.observation_space), *widths))
