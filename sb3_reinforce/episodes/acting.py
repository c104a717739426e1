"""Acting: observations in, sampled actions out, as NumPy arrays. All noise comes from one NumPy generator per episode."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common import distributions
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_reinforce.episodes.schedule import episode_rng, torch_seeded_from

#: Noise of each distribution's samples, by exact type: subclasses may sample differently
_NOISE: dict[type[Distribution], Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    distributions.DiagGaussianDistribution: lambda rng, shape: rng.standard_normal(shape, dtype=np.float32),
    distributions.CategoricalDistribution: lambda rng, shape: rng.gumbel(size=shape),
    distributions.MultiCategoricalDistribution: lambda rng, shape: rng.gumbel(size=shape),
    distributions.BernoulliDistribution: lambda rng, shape: rng.logistic(size=shape),
}


def sample_discrete(distribution: Distribution, logits: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """
    Sample discrete actions from (n_envs, n_outputs) logits: softmax distributions with standard Gumbel noise (the Gumbel-max
    trick: Gumbel, 1954; Maddison et al., 2014), bits with standard logistic noise.
    """
    if isinstance(distribution, distributions.BernoulliDistribution):
        return (logits + noise > 0).astype(np.int8)
    if isinstance(distribution, distributions.CategoricalDistribution):
        return (logits + noise).argmax(axis=-1)
    parts = np.split(logits + noise, np.cumsum(distribution.action_dims)[:-1], axis=1)  # type: ignore[attr-defined]
    return np.stack([part.argmax(axis=-1) for part in parts], axis=1)


def _noise_rows(rng: np.random.Generator, distribution: type[Distribution], n_outputs: int) -> Iterator[np.ndarray]:
    """(1, n_outputs) noise of one step after the other, drawn for up to 32 steps at once."""
    while True:
        yield from _NOISE[distribution](rng, (min(32, 1 + 2**16 // n_outputs), 1, n_outputs))


class EpisodeNoise:
    """Action noise of several sub-environments, from one generator per episode."""

    def __init__(self, n_envs: int, seed: int, sde_sample_freq: int = -1):
        self.seed, self.sde_sample_freq = seed, sde_sample_freq
        self.rngs = [episode_rng(seed, 0)] * n_envs
        self._rows: list[Iterator[np.ndarray] | None] = [None] * n_envs
        self._has_new, self._episode_steps = True, [0] * n_envs
        self._matrices: list[np.ndarray] = [np.empty(0)] * n_envs

    def begin(self, env_indices: Iterable[int], numbers: np.ndarray) -> None:
        """Start episodes in some sub-environments; ``numbers`` has the number of each sub-environment's episode."""
        for env_idx in env_indices:
            self.rngs[env_idx] = episode_rng(self.seed, int(numbers[env_idx]))
            self._rows[env_idx], self._episode_steps[env_idx] = None, 0
        self._has_new = True

    def draw(self, distribution: type[Distribution], n_outputs: int) -> np.ndarray:
        """Draw (n_envs, n_outputs) noise of the next step."""
        if self._has_new:
            streams = zip(self._rows, self.rngs, strict=True)
            self._rows = [rows or _noise_rows(rng, distribution, n_outputs) for rows, rng in streams]
            self._has_new = False
        drawn = [next(rows) for rows in self._rows if rows is not None]
        return drawn[0] if len(drawn) == 1 else np.concatenate(drawn)

    def draw_matrices(self, distribution: Any, log_std: th.Tensor) -> np.ndarray:
        """Draw (n_envs, n_features, n_actions) gSDE matrices of the next step."""
        for env_idx, n_steps in enumerate(self._episode_steps):
            if n_steps == 0 or (self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0):
                scale = distribution.get_std(log_std).detach().cpu().numpy()
                self._matrices[env_idx] = scale * self.rngs[env_idx].standard_normal(scale.shape, dtype=np.float32)
            self._episode_steps[env_idx] = n_steps + 1
        matrices = th.as_tensor(np.stack(self._matrices), device=log_std.device)
        distribution.exploration_mat, distribution.exploration_matrices = matrices[0], matrices  # for predict(), too
        return matrices.cpu().numpy()


def overrides(policy: BasePolicy, *names: str) -> bool:
    """Whether a policy (compiled or not) has a method of the given names that is neither this package's nor SB3's."""
    classes = type(getattr(policy, "_orig_mod", policy)).__mro__
    foreign = [cls for cls in classes if not cls.__module__.startswith(("sb3_reinforce.", "stable_baselines3.", "torch."))]
    return any(name in vars(cls) for cls in foreign for name in names)


class Actor:
    """Samples actions of any policy, in evaluation mode, with PyTorch."""

    def __init__(self, policy: ActorCriticPolicy, noise: EpisodeNoise):
        self.policy: Any = policy
        self.noise = noise
        self._has_own_forward = overrides(policy, "forward")
        space = policy.action_space
        self._actions_shape = (-1, *(space.shape or ()))
        # Broadcasting is slow for small arrays
        clips = isinstance(space, spaces.Box) and not policy.squash_output
        self._bounds = (space.low[None], space.high[None]) if clips else None  # type: ignore[attr-defined]

    def __call__(self, observations: Any) -> tuple[np.ndarray, np.ndarray]:
        """Sample (n_envs, *action shape) actions. Return them, and a copy for the environment: clipped, or unscaled."""
        actions = self._sample(observations)
        if actions.ndim != len(self._actions_shape):
            actions = actions.reshape(self._actions_shape)
        if self._bounds is not None:
            low, high = self._bounds
            clipped = np.maximum(actions, low)
            return actions, np.minimum(clipped, high, out=clipped)
        return actions, self.policy.unscale_action(actions) if self.policy.squash_output else actions.copy()

    def _sample(self, observations: Any) -> np.ndarray:
        policy = self.policy
        with th.no_grad():
            obs_tensor = obs_as_tensor(observations, policy.device)
            if self._has_own_forward:
                with torch_seeded_from(self.noise.rngs[0], policy.device):
                    return policy(obs_tensor)[0].cpu().numpy()
            if policy._forward_hooks or policy._forward_pre_hooks:
                with th.random.fork_rng():
                    policy(obs_tensor)
            distribution, _ = policy.evaluate_observations(obs_tensor)
            if type(distribution) is distributions.StateDependentNoiseDistribution:
                self.noise.draw_matrices(distribution, policy.log_std)
                return distribution.get_actions().cpu().numpy()
            if type(distribution) not in _NOISE:
                with torch_seeded_from(self.noise.rngs[0], policy.device):
                    return distribution.get_actions().cpu().numpy()
            parts: Any = distribution.distribution
            if isinstance(distribution, distributions.DiagGaussianDistribution):
                return self._sample_outputs(distribution, parts.mean.cpu().numpy(), parts.stddev.cpu().numpy())
            logits = th.cat([part.logits for part in parts], dim=1) if isinstance(parts, list) else parts.logits
            return self._sample_outputs(distribution, logits.cpu().numpy())

    def _sample_outputs(self, distribution: Distribution, outputs: np.ndarray, std: Any = None) -> np.ndarray:
        """Sample an action per row of outputs: means of Gaussians with standard deviations, or logits."""
        noise = self.noise.draw(type(distribution), outputs.shape[1])
        return outputs + std * noise if std is not None else sample_discrete(distribution, outputs, noise)


class MlpActor(Actor):
    """
    Samples the same actions up to rounding, with NumPy, for multi-layer perceptrons on the CPU, where PyTorch's overhead is
    larger than the arithmetic. NumPy shares the memory of the weights, so in-place changes act at once.
    """

    _ZERO = np.zeros((), dtype=np.float32)  # a scalar is slower
    _ACTIVATIONS: ClassVar[dict[type[nn.Module], Callable[..., Any]]] = {
        nn.ReLU: lambda x: np.maximum(x, MlpActor._ZERO, out=x),
        nn.Tanh: lambda x: np.tanh(x, out=x),
    }

    def __init__(self, policy: ActorCriticPolicy, noise: EpisodeNoise):
        super().__init__(policy, noise)
        self._normalizer: Any = getattr(policy, "observation_normalizer", None)
        self._version = -1
        self._layers: list[tuple[Any, Any, Callable[..., Any] | None]] = [
            (module.weight.detach().numpy().T, module.bias.detach().numpy()[None], None)
            if isinstance(module, nn.Linear)
            else (None, None, self._ACTIVATIONS[type(module)])
            for module in (*policy.mlp_extractor.policy_net, policy.action_net)
        ]
        # One-hot vectors select rows of the first weights
        space: Any = policy.observation_space
        is_one_hot = isinstance(space, (spaces.Discrete, spaces.MultiDiscrete))
        self._first_rows = np.cumsum([0, *getattr(space, "nvec", [0])[:-1]]) if is_one_hot else None
        self._action_dist = policy.action_dist
        is_gaussian = isinstance(policy.action_dist, distributions.DiagGaussianDistribution)
        self._log_std = policy.log_std.detach().numpy()[None] if is_gaussian else None
        self._statistics: Any = None if self._normalizer is None else self._normalizer.statistics()[:2]

    @classmethod
    def can_act_for(cls, policy: ActorCriticPolicy) -> bool:
        """Whether a policy consists of an optional normalizer, linear layers and known activation functions."""
        if not isinstance(policy, ActorCriticPolicy):  # compiled
            return False
        extractor, space = policy.features_extractor, policy.observation_space
        modules = [policy, policy.mlp_extractor, policy.action_net, extractor, *policy.mlp_extractor.modules()]
        return (
            not overrides(policy, "forward", "get_distribution", "extract_features", "_get_action_dist_from_latent")
            and type(policy.action_dist) in (*_NOISE, distributions.StateDependentNoiseDistribution)
            and not (policy.squash_output or any(module._forward_hooks or module._forward_pre_hooks for module in modules))
            and (policy.device.type == "cpu" and not isinstance(space, spaces.Dict) and not is_image_space(space))
            and not (policy.use_sde and isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)))
            and (type(extractor) is FlattenExtractor and policy.pi_features_extractor is extractor)
            and type(policy.mlp_extractor) is MlpExtractor
            and all(
                type(module) in cls._ACTIVATIONS or (type(module) is nn.Linear and module.bias is not None)
                for module in (*policy.mlp_extractor.policy_net, policy.action_net)
            )
        )

    def _sample(self, observations: Any) -> np.ndarray:
        x = latent = observations if observations.ndim == 2 else observations.reshape(len(observations), -1)
        layers = iter(self._layers)
        if self._first_rows is not None:
            weight, bias, _ = next(layers)
            x = weight[x[:, 0]] if x.shape[1] == 1 else weight[x + self._first_rows].sum(axis=1)
            x += bias
        else:
            x = latent = x.astype(np.float32, copy=False) if self._normalizer is None else self._normalize(x)
        for weight, bias, activate in layers:
            if activate is None:
                latent, x = x, x.dot(weight)
                x += bias
            else:
                activate(x)
        if isinstance(self._action_dist, distributions.StateDependentNoiseDistribution):
            return x + np.matmul(latent[:, None], self.noise.draw_matrices(self._action_dist, self.policy.log_std))[:, 0]
        return self._sample_outputs(self._action_dist, x, None if self._log_std is None else np.exp(self._log_std))

    def _normalize(self, observations: np.ndarray) -> np.ndarray:
        mean, var = self._statistics
        if mean._version + var._version != self._version:  # increased by in-place changes
            self._version = mean._version + var._version
            self._mean, self._std = mean.numpy().reshape(1, -1), th.sqrt(var + self._normalizer.eps).numpy().reshape(1, -1)
            self._mean32, self._std32 = self._mean.astype(np.float32), self._std.astype(np.float32)
            self._high = np.full_like(self._mean32, self._normalizer.clip)
            self._low = -self._high
        if observations.dtype == np.float32:
            x = (observations - self._mean32) / self._std32
        else:
            x = ((observations - self._mean) / self._std).astype(np.float32)
        return np.minimum(np.maximum(x, self._low, out=x), self._high, out=x)


def make_actor(policy: ActorCriticPolicy, noise: EpisodeNoise) -> Actor:
    """Make the fastest actor for a policy."""
    return MlpActor(policy, noise) if MlpActor.can_act_for(policy) else Actor(policy, noise)
