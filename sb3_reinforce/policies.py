"""Policies of REINFORCE: SB3's actor-critic policies with a closed-form baseline for a critic."""

import functools
import sys
from collections.abc import Iterable
from typing import Any, Literal

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_reinforce.baselines import BASELINES, ActionValues, BaselineFeatures, LinearBaseline
from sb3_reinforce.episodes.acting import overrides
from sb3_reinforce.episodes.normalization import CHUNK, ObservationNormalizer

BaselineName = Literal["linear", "random_features"]


def flatten(tensors: Iterable[th.Tensor]) -> th.Tensor:
    """Concatenate tensors into one vector."""
    return th.cat([tensor.flatten() for tensor in tensors])


class BaselinePolicy(ActorCriticPolicy):
    """
    Mixin that makes ``value_net`` of any ``ActorCriticPolicy`` a closed-form baseline, see :func:`with_baseline`. The critic
    branch of ``mlp_extractor`` makes its features; that of SB3's ``MlpExtractor`` is removed. See ``REINFORCE`` for the
    parameters; ``action_values`` asks for a critic of action values, too.
    """

    initial_norm: th.Tensor

    def __init__(
        self,
        *args: Any,
        baseline: BaselineName | None = "random_features",
        baseline_memory: float = 0.6,
        baseline_kwargs: dict[str, Any] | None = None,
        gamma: float = 0.99,
        normalize_observations: bool = False,
        action_values: bool = False,
        **kwargs: Any,
    ):
        self.baseline, self.baseline_memory, self.baseline_kwargs = baseline, baseline_memory, baseline_kwargs or {}
        self.gamma, self.normalize_observations, self.action_values = gamma, normalize_observations, action_values
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        if type(self.mlp_extractor) is MlpExtractor:
            self.mlp_extractor.value_net, self.mlp_extractor.latent_dim_vf = nn.Sequential(), self.features_dim

    def _build(self, lr_schedule: Schedule) -> None:
        normalizer = ObservationNormalizer(self.observation_space) if self.normalize_observations else None
        #: None if no observation is normalized
        self.observation_normalizer = normalizer if normalizer is not None and normalizer.keys else None
        super()._build(lr_schedule)
        self._init_actor()
        if self.observation_normalizer is not None:
            self.register_buffer("initial_norm", flatten(self.action_net.parameters()).detach().norm())
        # Last, so that their random projections do not change the initial actor
        self._build_critics()
        # The baseline replaces a layer whose parameters the optimizer has, too
        own = {id(parameter) for parameter in self.parameters()}
        for group in self.optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in own]

    def _init_actor(self) -> None: ...

    def trained_parameters(self) -> list[th.Tensor]:
        """Parameters of the optimizer that are not frozen."""
        groups = self.optimizer.param_groups
        return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]

    def update_statistics(self, observations: Any) -> None:
        """Update the statistics of observations, unless the actor was trained before without, e.g. on demonstrations."""
        if (normalizer := self.observation_normalizer) is not None:
            is_initial = th.isclose(flatten(self.action_net.parameters()).norm(), self.initial_norm)
            if normalizer.count_0 > 0 or is_initial:
                normalizer.update(observations)

    def _build_critics(self) -> None:
        #: None if there is no critic of action values
        self.action_value_net: ActionValues | None = None
        # Many learned features are constant, so the fit needs a ridge
        is_learned = any(True for _ in self.vf_features_extractor.parameters())
        n_units, time, ridge = BASELINES[self.baseline or "linear"]  # Without a baseline, a linear one stays 0
        given = dict(n_units=n_units, time=time, ridge=BASELINES["random_features"][2] if is_learned else ridge)
        given |= self.baseline_kwargs
        kwargs: Any = dict(ridge=given.pop("ridge"), memory=self.baseline_memory, truncate=is_learned)
        features = BaselineFeatures(self.mlp_extractor.latent_dim_vf, gamma=self.gamma, **given)  # type: ignore[arg-type]
        self.value_net = LinearBaseline(features, **kwargs)  # type: ignore[assignment]
        if self.action_values:
            self.action_value_net = ActionValues(self.value_net.n_features, self.action_space, self.squash_output, **kwargs)  # type: ignore[arg-type]

    # SB3's get_distribution() and predict_values() do not call extract_features()
    def _normalize(self, obs: PyTorchObs) -> PyTorchObs:
        return obs if self.observation_normalizer is None else self.observation_normalizer(obs)

    def extract_features(self, obs: PyTorchObs, *args: Any) -> Any:
        return super().extract_features(self._normalize(obs), *args)

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        return super().get_distribution(self._normalize(obs))

    def predict_values(self, obs: PyTorchObs, n_steps: th.Tensor | None = None) -> th.Tensor:
        """Estimate values, see SB3: at the start of an episode, or after (batch,) ``n_steps`` of it."""
        features = BasePolicy.extract_features(self, self._normalize(obs), self.vf_features_extractor)
        return self.value_net(self.mlp_extractor.forward_critic(features), n_steps)

    def evaluate_observations(self, obs: PyTorchObs) -> tuple[Distribution, th.Tensor]:
        """Compute the distribution of actions (an object that the next call changes), and the critic's extracted features."""
        features = self.extract_features(obs)
        pi_features, vf_features = (features, features) if self.share_features_extractor else features
        if overrides(self, "get_distribution"):
            return self.get_distribution(obs), vf_features
        return self._get_action_dist_from_latent(self.mlp_extractor.forward_actor(pi_features)), vf_features

    def baseline_features(self, vf_features: th.Tensor, n_steps: th.Tensor) -> th.Tensor:
        """Compute the (n, n_features) features of the baseline after (n,) ``n_steps`` of an episode."""
        return self.value_net.project(self.mlp_extractor.forward_critic(vf_features), n_steps)  # type: ignore[operator]

    def chunk_size(self) -> int:
        """Number of observations per forward pass, which bounds its memory. Batch normalization needs the whole batch."""
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules()):
            return sys.maxsize
        widths = [module.out_features for module in self.modules() if isinstance(module, nn.Linear)]
        # The normalizer copies observations
        n_copies = 1 if self.observation_normalizer is None else 4
        return max(1, CHUNK // max(n_copies * spaces.flatdim(self.observation_space), *widths))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = ("baseline", "baseline_memory", "baseline_kwargs", "gamma", "normalize_observations", "action_values")
        names = (*own, "share_features_extractor")
        return super()._get_constructor_parameters() | {name: getattr(self, name) for name in names}


class MlpPolicy(BaselinePolicy):
    """
    Policy for vector observations. Parameters that are not listed are those of SB3's ``ActorCriticPolicy``. A ``vf`` entry of
    ``net_arch`` is ignored: the baseline has no hidden layers.

    :param ortho_init: Whether to use orthogonal initialization. False for Glorot-uniform weights and zero biases in the actor
    :param log_std_init: Initial value for the log standard deviation
    :param normalize_observations: See ``REINFORCE``
    """

    default_features_extractor: type[nn.Module] = FlattenExtractor

    def __init__(self, *args: Any, log_std_init: float = 0.5, normalize_observations: bool = True, **kwargs: Any):
        kwargs.setdefault("features_extractor_class", self.default_features_extractor)
        super().__init__(*args, log_std_init=log_std_init, normalize_observations=normalize_observations, **kwargs)

    def _init_actor(self) -> None:
        if self.ortho_init:
            return
        # Glorot & Bengio (2010), the default of Keras and of the article
        for module in (*self.mlp_extractor.policy_net.modules(), self.action_net):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)


class CnnPolicy(MlpPolicy):
    """:class:`MlpPolicy` for images, with SB3's ``NatureCNN`` as features extractor."""

    default_features_extractor = NatureCNN


class MultiInputPolicy(MlpPolicy):
    """:class:`MlpPolicy` for dictionary observations, with SB3's ``CombinedExtractor`` as features extractor."""

    default_features_extractor = CombinedExtractor


@functools.cache
def with_baseline(policy_class: type[BasePolicy]) -> type[BaselinePolicy]:
    """Combine a policy class with :class:`BaselinePolicy`, unless it has one."""
    if issubclass(policy_class, BaselinePolicy):
        return policy_class
    # Unlike the combined class, the class of the user can be pickled
    own = {"__module__": __name__, "__reduce__": lambda policy: (_new_policy, (policy_class,), policy.__dict__)}
    return type(policy_class.__name__, (BaselinePolicy, policy_class), own)


def _new_policy(policy_class: type[BasePolicy]) -> BaselinePolicy:
    combined = with_baseline(policy_class)
    return combined.__new__(combined)
