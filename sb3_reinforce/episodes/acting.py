"""
Acting: observations in, sampled actions out, as NumPy arrays.

All randomness comes from one NumPy generator an episode: actions depend on the weights, the observations and the number of
the episode, and no global generator is touched.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_reinforce.episodes.normalization import normalizer_of
from sb3_reinforce.episodes.schedule import episode_rng

Observations = np.ndarray | dict[str, np.ndarray]


def categorical_actions(logits: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """
    Sample from softmax distributions: the largest of the logits plus Gumbel noise (Gumbel, 1954; Maddison et al., 2014).

    :param logits: (n_envs, n_actions) log-probabilities up to a constant a row
    :param noise: (n_envs, n_actions) standard Gumbel numbers
    :return: (n_envs,) integers below n_actions
    """
    return (logits + noise).argmax(axis=-1)


def multi_categorical_actions(logits: np.ndarray, noise: np.ndarray, action_dims: list[int]) -> np.ndarray:
    """
    Sample from several softmax distributions, side by side in the arguments of :func:`categorical_actions`.

    :param action_dims: number of discrete actions of each distribution
    :return: (n_envs, number of distributions) integers
    """
    splits = np.cumsum(action_dims)[:-1]
    parts = zip(np.split(logits, splits, axis=1), np.split(noise, splits, axis=1), strict=True)
    return np.stack([categorical_actions(*part) for part in parts], axis=1)


def bernoulli_actions(logits: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """
    Sample independent bits: 1 where the logit plus logistic noise is positive.

    :param logits: (n_envs, n_bits) log-odds of a 1
    :param noise: (n_envs, n_bits) standard logistic numbers
    :return: (n_envs, n_bits) of 0 and 1
    """
    return (logits + noise > 0).astype(np.int8)


def state_dependent_noise(latent: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """
    The noise of gSDE, linear in the features of the state, which makes it smooth in time (Raffin et al., 2021,
    https://arxiv.org/abs/2005.05719).

    :param latent: (n_envs, n_features) what the output layer of the actor sees
    :param matrices: (n_envs, n_features, n_actions) one for each environment
    :return: (n_envs, n_actions)
    """
    return np.matmul(latent[:, None], matrices)[:, 0]


#: Distribution -> the noise that its samples are made of. Exactly these: a subclass may sample differently.
_NOISE: dict[type[Distribution], Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    DiagGaussianDistribution: lambda rng, shape: rng.standard_normal(shape, dtype=np.float32),
    CategoricalDistribution: lambda rng, shape: rng.gumbel(size=shape),
    MultiCategoricalDistribution: lambda rng, shape: rng.gumbel(size=shape),
    BernoulliDistribution: lambda rng, shape: rng.logistic(size=shape),
}

#: Threads share PyTorch's generators
_TORCH_LOCK = threading.RLock()

#: Noise is drawn for so many steps at once, unless these are very many numbers.
_STEPS_OF_NOISE = 32


def _stream(rng: np.random.Generator, distribution: type[Distribution], n_outputs: int) -> Iterator[np.ndarray]:
    """One row of noise after the other; drawn for several steps at once, which takes a tenth of the time."""
    while True:
        yield from _NOISE[distribution](rng, (min(_STEPS_OF_NOISE, 1 + 2**16 // n_outputs), 1, n_outputs))


class EpisodeNoise:
    """
    The randomness of the actions of several environments, from one generator an episode.

    :param n_envs: number of environments
    :param seed: together with the number of an episode, fixes its noise
    :param sde_sample_freq: steps after which an episode gets another gSDE matrix, -1 for one matrix an episode
    """

    def __init__(self, n_envs: int, seed: int, sde_sample_freq: int = -1):
        self.seed = seed
        self.sde_sample_freq = sde_sample_freq
        self.rngs = [episode_rng(seed, 0)] * n_envs
        # Noise of each environment's episode, one (1, n_outputs) row a step; None until it is known what for
        self._streams: list[Iterator[np.ndarray] | None] = [None] * n_envs
        self._has_new = True
        # Steps of each environment's episode, and its gSDE matrix
        self._ages = [0] * n_envs
        self._matrices: list[np.ndarray] = [np.empty(0)] * n_envs

    def begin(self, env_indices: Iterable[int], numbers: np.ndarray) -> None:
        """Some environments begin an episode; ``numbers`` has those of the episodes of all."""
        for env_idx in env_indices:
            self.rngs[env_idx] = episode_rng(self.seed, int(numbers[env_idx]))
            self._streams[env_idx] = None
            self._ages[env_idx] = 0
        self._has_new = True

    def draw(self, distribution: type[Distribution], n_outputs: int) -> np.ndarray:
        """(n_envs, n_outputs) noise of the next step for samples of a distribution."""
        if self._has_new:
            streams = zip(self._streams, self.rngs, strict=True)
            self._streams = [stream or _stream(rng, distribution, n_outputs) for stream, rng in streams]
            self._has_new = False
        rows = [next(stream) for stream in self._streams if stream is not None]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def draw_matrices(self, std: Callable[[], np.ndarray]) -> np.ndarray:
        """(n_envs, n_features, n_actions) gSDE matrices of the next step; ``std()`` gives their standard deviations."""
        for env_idx, age in enumerate(self._ages):
            if age == 0 or (self.sde_sample_freq > 0 and age % self.sde_sample_freq == 0):
                scale = std()
                self._matrices[env_idx] = scale * self.rngs[env_idx].standard_normal(scale.shape, dtype=np.float32)
            self._ages[env_idx] = age + 1
        return np.stack(self._matrices)


def overrides(policy: BasePolicy, *names: str) -> bool:
    """Whether a policy (compiled or not) has one of some methods from a class outside of this package and SB3."""
    classes = type(getattr(policy, "_orig_mod", policy)).__mro__
    foreign = [cls for cls in classes if not cls.__module__.startswith(("sb3_reinforce.", "stable_baselines3.", "torch."))]
    return any(name in vars(cls) for cls in foreign for name in names)


def evaluate(policy: ActorCriticPolicy, obs: PyTorchObs) -> tuple[Distribution, th.Tensor]:
    """
    Look at observations once, as SB3's ``evaluate_actions`` does before it comes to the actions.

    :param policy: the policy
    :param obs: (n, ...) tensor, or a dictionary of these
    :return: the distribution of the actions (a policy has one object for all of them), and the extracted features of the
        critic
    """
    features: Any = policy.extract_features(obs)
    pi_features, vf_features = (features, features) if policy.share_features_extractor else features
    if overrides(policy, "get_distribution"):
        return policy.get_distribution(obs), vf_features
    # Private, but what custom policies override, and the only way from the latent code to the distribution
    return policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(pi_features)), vf_features


def baseline_features(policy: ActorCriticPolicy, obs: PyTorchObs, vf_features: Any = None) -> th.Tensor:
    """What the baseline is linear in, (n, n_features); ``vf_features`` are those of :func:`evaluate`, None if not known."""
    if vf_features is None:
        features: Any = policy.extract_features(obs)
        vf_features = features if policy.share_features_extractor else features[1]
    return policy.value_net.project(policy.mlp_extractor.forward_critic(vf_features))  # type: ignore[operator]


class Actor:
    """
    Samples actions of any policy, through PyTorch.

    :param policy: the policy, in evaluation mode
    :param noise: supplies the randomness
    """

    def __init__(self, policy: ActorCriticPolicy, noise: EpisodeNoise):
        self.policy = policy
        self.noise = noise
        self._own_forward = overrides(policy, "forward")
        #: (n_envs,) the baseline's values of the latest observations, NaN unless they come almost for nothing: another pass
        #: of a shared CNN over the batch takes a tenth of learn()
        self.values: Any = np.nan
        learned = any(True for _ in policy.features_extractor.parameters())
        self._brings_values = policy.share_features_extractor and learned and not self._own_forward
        space = policy.action_space
        self._actions_shape = (-1, *(space.shape or ()))
        # With a first dimension of their own: for one environment, NumPy combines arrays of equal shape in half the time
        clips = isinstance(space, spaces.Box) and not policy.squash_output
        self._bounds = (space.low[None], space.high[None]) if clips else None  # type: ignore[attr-defined]

    def is_current(self, policy: ActorCriticPolicy) -> bool:
        """Whether this still acts as the model's policy, unless :func:`watch_modules` has seen something replaced."""
        return policy is self.policy

    def __call__(self, observations: Observations) -> tuple[np.ndarray, np.ndarray]:
        """
        :param observations: (n_envs, ...) as a ``VecEnv`` returns them
        :return: (n_envs, *action shape) actions as sampled, and what the environment gets for them, as in SB3: unscaled when
            the policy squashes them, else clipped to the bounds of the action space
        :raises ValueError: when the policy's output is NaN or infinite
        """
        actions = self._sample(observations)
        if actions.ndim != len(self._actions_shape):
            actions = actions.reshape(self._actions_shape)
        if self._bounds is not None:
            low, high = self._bounds
            # What np.clip does, in a third of the time for a handful of numbers
            clipped = np.maximum(actions, low)
            return actions, np.minimum(clipped, high, out=clipped)
        if self.policy.squash_output:
            return actions, self.policy.unscale_action(actions)
        return actions, actions

    def _sample(self, observations: Observations) -> np.ndarray:
        """Actions, in any shape."""
        with th.no_grad(), explain_nan():
            obs_tensor = obs_as_tensor(observations, self.policy.device)
            if self._own_forward:
                with torch_seeded_from(self.noise.rngs[0], self.policy.device):
                    return check_output(self.policy(obs_tensor)[0].cpu().numpy())
            distribution, vf_features = evaluate(self.policy, obs_tensor)
            if self._brings_values:
                features = baseline_features(self.policy, obs_tensor, vf_features)
                self.values = self.policy.value_net.predict(features).cpu().numpy().flatten()  # type: ignore[operator]
            if type(distribution) is StateDependentNoiseDistribution:
                # All its randomness is in the matrices
                matrices = th.as_tensor(self._next_matrices(distribution), device=self.policy.device)
                distribution.exploration_mat, distribution.exploration_matrices = matrices[0], matrices
                return check_output(distribution.get_actions().cpu().numpy())
            if type(distribution) not in _NOISE:
                with torch_seeded_from(self.noise.rngs[0], self.policy.device):
                    return check_output(distribution.get_actions().cpu().numpy())
            parts: Any = distribution.distribution
            if isinstance(distribution, DiagGaussianDistribution):
                return self._sample_outputs(distribution, parts.mean.cpu().numpy(), parts.stddev.cpu().numpy())
            logits = th.cat([part.logits for part in parts], dim=1) if isinstance(parts, list) else parts.logits
            return self._sample_outputs(distribution, logits.cpu().numpy())

    def _next_matrices(self, distribution: StateDependentNoiseDistribution) -> np.ndarray:
        return self.noise.draw_matrices(lambda: distribution.get_std(self.policy.log_std).detach().cpu().numpy())

    def _sample_outputs(self, action_dist: Distribution, outputs: np.ndarray, std: np.ndarray | None = None) -> np.ndarray:
        """One action for each row of outputs: means of Gaussians with a standard deviation, logits of everything else."""
        noise = self.noise.draw(type(action_dist), outputs.shape[1])
        # Samples of a Gaussian show what is wrong with its mean or its standard deviation
        if std is not None:
            return check_output(outputs + std * noise)
        check_output(outputs)
        if isinstance(action_dist, CategoricalDistribution):
            return categorical_actions(outputs, noise)
        if isinstance(action_dist, MultiCategoricalDistribution):
            return multi_categorical_actions(outputs, noise, action_dist.action_dims)
        return bernoulli_actions(outputs, noise)


class MlpActor(Actor):
    """
    Samples the same actions, up to rounding, of a plain multi-layer perceptron on the CPU with NumPy, which sees the same
    memory: in networks of a few dozen units, PyTorch's cost per call is many times that of the arithmetic.
    """

    # In place, and with an array of the right type to compare with: each saves a microsecond
    _ZERO = np.zeros((), dtype=np.float32)
    _ACTIVATIONS: ClassVar[dict[type[nn.Module], Callable[..., Any]]] = {
        nn.ReLU: lambda x: np.maximum(x, MlpActor._ZERO, out=x),
        nn.Tanh: lambda x: np.tanh(x, out=x),
    }

    def __init__(self, policy: ActorCriticPolicy, noise: EpisodeNoise):
        super().__init__(policy, noise)
        self._normalizer = normalizer_of(policy)
        if self._normalizer is not None:
            self._mean, self._std = (x.numpy().reshape(1, -1) for x in self._normalizer.shift_and_scale(""))
            self._mean32, self._std32 = self._mean.astype(np.float32), self._std.astype(np.float32)
            self._high = np.full_like(self._mean32, self._normalizer.clip)
            self._low = -self._high
        # Weight and bias of a layer, or an activation
        self._layers: list[tuple[Any, Any, Callable[..., Any] | None]] = [
            (module.weight.detach().numpy().T, module.bias.detach().numpy()[None], None)
            if isinstance(module, nn.Linear)
            else (None, None, self._ACTIVATIONS[type(module)])
            for module in (*policy.mlp_extractor.policy_net, policy.action_net)
        ]
        is_gaussian = isinstance(policy.action_dist, DiagGaussianDistribution)
        self._action_dist = policy.action_dist
        self._log_std = policy.log_std.detach().numpy()[None] if is_gaussian else None
        # A callback may put other memory in the place of a parameter, and the arrays made of the statistics are copies
        names = [] if self._normalizer is None else ["mean_0", "var_0"]
        self._statistics = [self._normalizer.get_buffer(name) for name in names]  # type: ignore[union-attr]
        self._tensors: list[th.Tensor] = [*policy.parameters(), *self._statistics]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._versions = [tensor._version for tensor in self._statistics]
        modules = (*policy.mlp_extractor.policy_net, policy.action_net)
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]

    def is_current(self, policy: ActorCriticPolicy) -> bool:
        # About a microsecond, 2 % of learn() on LunarLanderContinuous-v3
        return (
            policy is self.policy
            and list(map(th.Tensor.data_ptr, self._tensors)) == self._addresses
            and [tensor._version for tensor in self._statistics] == self._versions
            and not any(self._hooks)
        )

    @classmethod
    def can_act_for(cls, policy: ActorCriticPolicy) -> bool:
        """Whether a policy is nothing but a normalizer (or none), Linear layers, and activations that are known here."""
        if not isinstance(policy, ActorCriticPolicy):  # compiled, for instance
            return False
        extractor = policy.features_extractor
        modules = [policy, policy.mlp_extractor, policy.action_net, extractor, *policy.mlp_extractor.modules()]
        return (
            not overrides(policy, "forward", "get_distribution", "extract_features", "_get_action_dist_from_latent")
            and type(policy.action_dist) in (*_NOISE, StateDependentNoiseDistribution)
            and not policy.squash_output
            and policy.device.type == "cpu"
            and isinstance(policy.observation_space, spaces.Box)
            and not is_image_space(policy.observation_space)
            and type(extractor) is FlattenExtractor
            and policy.pi_features_extractor is extractor
            and type(policy.mlp_extractor) is MlpExtractor
            and all(
                type(module) in cls._ACTIVATIONS or (type(module) is nn.Linear and module.bias is not None)
                for module in (*policy.mlp_extractor.policy_net, policy.action_net)
            )
            and not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        )

    def _sample(self, observations: Observations) -> np.ndarray:
        assert isinstance(observations, np.ndarray)
        x = observations
        if x.ndim != 2:
            x = x.reshape(len(x), -1)
        if self._normalizer is None:
            x = x.astype(np.float32, copy=False)
        else:
            if x.dtype == np.float32:
                x = (x - self._mean32) / self._std32
            else:
                x = ((x - self._mean) / self._std).astype(np.float32)
            np.minimum(np.maximum(x, self._low, out=x), self._high, out=x)
        latent = x
        for weight, bias, activate in self._layers:
            if activate is None:
                # Half the time of x @ weight for arrays as small as these
                latent, x = x, x.dot(weight)
                x += bias
            else:
                activate(x)
        if isinstance(self._action_dist, StateDependentNoiseDistribution):
            return check_output(x + state_dependent_noise(latent, self._next_matrices(self._action_dist)))
        std = None if self._log_std is None else np.exp(self._log_std)
        return self._sample_outputs(self._action_dist, x, std)


def make_actor(policy: ActorCriticPolicy, noise: EpisodeNoise) -> Actor:
    """The fastest way to sample actions of a policy, to be used while it is current."""
    return MlpActor(policy, noise) if MlpActor.can_act_for(policy) else Actor(policy, noise)


@contextmanager
def watch_modules() -> Iterator[list[str]]:
    """A list that grows when modules, parameters or buffers are put into any PyTorch module, by a callback for instance."""
    changes: list[str] = []
    hooks = [
        getattr(nn.modules.module, f"register_module_{kind}_registration_hook") for kind in ("parameter", "module", "buffer")
    ]
    handles = [hook(lambda module, name, value: changes.append(name)) for hook in hooks]
    try:
        yield changes
    finally:
        for handle in handles:
            handle.remove()


def all_finite(values: np.ndarray) -> bool:
    """Whether no value of an array of any shape and type is NaN or infinite."""
    if values.dtype.kind != "f":
        return True
    # The sum of squares is finite only if all values are, and costs a third of looking at them; it may overflow, though
    return math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def check_output(values: np.ndarray) -> np.ndarray:
    """Return what a policy's network returned, or raise a ValueError if a value of it is NaN or infinite."""
    if not all_finite(values):
        raise ValueError(f"The policy's output is not finite: {values.tolist()}")
    return values


@contextmanager
def explain_nan() -> Iterator[None]:
    """Translate PyTorch's constraint error into the words used everywhere else for an output that is NaN."""
    try:
        yield
    except ValueError as error:
        if "to satisfy the constraint" not in str(error):
            raise
        raise ValueError(f"The policy's output is not finite: {error}") from error


@contextmanager
def torch_seeded_from(rng: np.random.Generator, device: th.device) -> Iterator[None]:
    """Let PyTorch draw on a device from a seed that a NumPy generator supplies, and leave its generators as they were."""
    seed = int(rng.integers(2**63))
    with _TORCH_LOCK, th.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not th.manual_seed, which takes a millisecond to prepare devices that are not there
        th.default_generator.manual_seed(seed)
        if device.type == "cuda":
            th.cuda.manual_seed(seed)
        yield
