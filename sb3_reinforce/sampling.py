"""
Acting: observations in, sampled actions out, as NumPy arrays. No value, no log-probability, no autograd.

All randomness comes from a NumPy generator, so that actions are a function of the weights, the observations and that
generator, and no global generator is touched.
"""

import math
from collections.abc import Callable, Iterator
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
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_reinforce.policies import NormalizedExtractor

Observations = np.ndarray | dict[str, np.ndarray]


def gaussian_actions(mean: np.ndarray, std: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """
    Sample from diagonal Gaussians.

    :param mean: (n_envs, n_actions)
    :param std: (n_envs, n_actions) or (1, n_actions), above 0
    :param noise: (n_envs, n_actions) standard normal numbers
    :return: (n_envs, n_actions)
    """
    return mean + std * noise


def categorical_actions(logits: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """
    Sample from softmax distributions: the largest of the logits plus Gumbel noise (Gumbel, 1954; Maddison et al., 2014).

    :param logits: (n_envs, n_choices) log-probabilities up to a constant a row
    :param noise: (n_envs, n_choices) standard Gumbel numbers
    :return: (n_envs,) integers below n_choices
    """
    return (logits + noise).argmax(axis=-1)


def multi_categorical_actions(logits: np.ndarray, noise: np.ndarray, n_choices: list[int]) -> np.ndarray:
    """
    Sample from several independent softmax distributions.

    :param logits: (n_envs, sum of n_choices) log-probabilities, up to a constant a row for each distribution
    :param noise: (n_envs, sum of n_choices) standard Gumbel numbers
    :param n_choices: size of each distribution
    :return: (n_envs, number of distributions) integers below n_choices
    """
    splits = np.cumsum(n_choices)[:-1]
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


#: Distribution -> the noise that its samples are made of. Exactly these: a subclass may sample differently
_NOISE: dict[type[Distribution], Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    DiagGaussianDistribution: lambda rng, shape: rng.standard_normal(shape, dtype=np.float32),
    CategoricalDistribution: lambda rng, shape: rng.gumbel(size=shape),
    MultiCategoricalDistribution: lambda rng, shape: rng.gumbel(size=shape),
    BernoulliDistribution: lambda rng, shape: rng.logistic(size=shape),
}

#: Noise is drawn for so many steps at once, as long as these are not too many numbers: a call costs as much as a hundred
_STEPS_OF_NOISE = 256
_NUMBERS_OF_NOISE = 2**16


def state_dependent_noise(latent: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """
    The noise of generalized state-dependent exploration: a linear function of the state's features, which stays the same for
    a while, and so is smooth in time (Raffin et al., 2021, https://arxiv.org/abs/2005.05719).

    :param latent: (n_envs, n_features) what the output layer of the actor sees
    :param matrices: (n_envs, n_features, n_actions) one for each environment
    :return: (n_envs, n_actions)
    """
    return np.matmul(latent[:, None], matrices)[:, 0]


class Actor:
    """
    Samples actions of any policy, through PyTorch, for one rollout.

    :param policy: the policy, in evaluation mode
    :param rng: supplies the randomness
    """

    def __init__(self, policy: ActorCriticPolicy, rng: np.random.Generator):
        self.policy = policy
        self.rng = rng
        self._brings_values = _brings_values(policy)
        self._noise: Iterator[np.ndarray] = iter(())
        space = policy.action_space
        self._actions_shape = (-1, *(space.shape or ()))
        # With a first dimension of their own, as everything here that is combined with arrays of one row an environment:
        # for a single environment, NumPy then has arrays of equal shape to combine, in half the time that broadcasting takes
        clips = isinstance(space, spaces.Box) and not policy.squash_output
        self._bounds = (space.low[None], space.high[None]) if clips else None  # type: ignore[attr-defined]

    def __call__(self, observations: Observations) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """
        :param observations: (n_envs, ...) as a ``VecEnv`` returns them
        :return: (n_envs, *action shape) actions as sampled, and what the environment gets for them, as in SB3: unscaled when
            the policy squashes them, else clipped to the bounds of the action space; and (n_envs,) the baseline's values of
            the observations where they come almost for nothing, else None
        :raises ValueError: when the policy's output is NaN or infinite
        """
        actions, values = self._sample(observations)
        if actions.ndim != len(self._actions_shape):
            actions = actions.reshape(self._actions_shape)
        if self._bounds is not None:
            low, high = self._bounds
            # What np.clip does, in a third of the time for a handful of numbers
            clipped = np.maximum(actions, low)
            return actions, np.minimum(clipped, high, out=clipped), values
        if self.policy.squash_output:
            return actions, self.policy.unscale_action(actions), values
        return actions, actions, values

    def _sample(self, observations: Observations) -> tuple[np.ndarray, np.ndarray | None]:
        """Actions, in any shape, and values."""
        with th.no_grad():
            obs_tensor = obs_as_tensor(observations, self.policy.device)
            with nan_explained():
                distribution, values = self._get_distribution(obs_tensor)
            if type(distribution) is StateDependentNoiseDistribution:
                # All its randomness is in the matrices
                return check_output(distribution.get_actions().cpu().numpy()), values
            if type(distribution) not in _NOISE:
                with torch_seeded_from(self.rng, self.policy.device):
                    actions = distribution.get_actions().cpu().numpy()
                return check_output(actions), values
            parts: Any = distribution.distribution
            if isinstance(distribution, DiagGaussianDistribution):
                return self._sample_outputs(distribution, parts.mean.cpu().numpy(), parts.stddev.cpu().numpy()), values
            logits = th.cat([part.logits for part in parts], dim=1) if isinstance(parts, list) else parts.logits
            return self._sample_outputs(distribution, logits.cpu().numpy()), values

    def _get_distribution(self, obs_tensor: PyTorchObs) -> tuple[Distribution, np.ndarray | None]:
        """``policy.get_distribution()`` and, if they are brought along, the values: as in SB3's ``policy.forward()``."""
        if not self._brings_values:
            return self.policy.get_distribution(obs_tensor), None
        features = self.policy.extract_features(obs_tensor)
        if self.policy.share_features_extractor:
            latent_pi, latent_vf = self.policy.mlp_extractor(features)
        else:
            latent_pi = self.policy.mlp_extractor.forward_actor(features[0])
            latent_vf = self.policy.mlp_extractor.forward_critic(features[1])
        values = self.policy.value_net(latent_vf).cpu().numpy().flatten()
        return self.policy._get_action_dist_from_latent(latent_pi), values

    def _sample_outputs(self, action_dist: Distribution, outputs: np.ndarray, std: np.ndarray | None = None) -> np.ndarray:
        """
        Sample one action for each row of the outputs of the policy network.

        :param action_dist: the distribution that they are for
        :param outputs: (n_envs, n_outputs) means for Gaussians, logits for everything else
        :param std: (n_envs, n_actions) or (1, n_actions) standard deviations of Gaussians
        :return: (n_envs, ...) actions
        :raises ValueError: when an output is NaN or infinite
        """
        noise = next(self._noise, None)
        if noise is None:
            n_steps = max(1, min(_STEPS_OF_NOISE, _NUMBERS_OF_NOISE // outputs.size))
            self._noise = iter(_NOISE[type(action_dist)](self.rng, (n_steps, *outputs.shape)))
            noise = next(self._noise)
        # Samples of a Gaussian tell of its mean and its standard deviation alike
        if std is not None:
            return check_output(gaussian_actions(outputs, std, noise))
        check_output(outputs)
        if isinstance(action_dist, CategoricalDistribution):
            return categorical_actions(outputs, noise)
        if isinstance(action_dist, MultiCategoricalDistribution):
            return multi_categorical_actions(outputs, noise, action_dist.action_dims)
        return bernoulli_actions(outputs, noise)


def _brings_values(policy: ActorCriticPolicy) -> bool:
    """
    Whether to act as SB3's ``policy.forward()`` does, which has the values, too: where the actor's features take a network to
    extract and are those of the baseline as well, and where a policy has its own way to extract features.
    """
    if not isinstance(policy, ActorCriticPolicy):  # compiled, for instance
        return False
    own = type(policy)
    if (
        own.get_distribution is not ActorCriticPolicy.get_distribution
        or own.predict_values is not ActorCriticPolicy.predict_values
    ):
        return False
    shares_network = policy.share_features_extractor and any(True for _ in policy.features_extractor.parameters())
    return shares_network or own.extract_features is not ActorCriticPolicy.extract_features


def _is_gsde_without_squashing(action_dist: Distribution) -> bool:
    return type(action_dist) is StateDependentNoiseDistribution and action_dist.bijector is None


class MlpActor(Actor):
    """
    Samples actions of a plain multi-layer perceptron on the CPU with NumPy, which sees the same memory: for networks of a few
    dozen units, PyTorch's cost per call is many times that of the arithmetic. Same actions as :class:`Actor`, up to rounding.

    :param policy: a policy that :meth:`can_act_for` accepts, in evaluation mode
    :param rng: supplies the randomness
    """

    _ZERO = np.zeros((), dtype=np.float32)
    _ACTIVATIONS: ClassVar[dict[type[nn.Module], Callable[..., Any]]] = {
        nn.ReLU: lambda x: np.maximum(x, MlpActor._ZERO, out=x),
        nn.Tanh: lambda x: np.tanh(x, out=x),
    }

    def __init__(self, policy: ActorCriticPolicy, rng: np.random.Generator):
        super().__init__(policy, rng)
        extractor = policy.features_extractor
        self._normalizer = extractor.normalizer if isinstance(extractor, NormalizedExtractor) else None
        if self._normalizer is not None:
            self._mean, self._std = (x.numpy().reshape(1, -1) for x in self._normalizer.shift_and_scale("", th.float32))
        # Weight and bias of a hidden layer, or an activation
        self._layers: list[tuple[Any, Any, Callable[..., Any] | None]] = [
            (module.weight.detach().numpy().T, module.bias.detach().numpy()[None], None)
            if isinstance(module, nn.Linear)
            else (None, None, self._ACTIVATIONS[type(module)])
            for module in policy.mlp_extractor.policy_net
        ]
        assert isinstance(policy.action_net, nn.Linear)
        self._weight: Any = policy.action_net.weight.detach().numpy().T
        self._bias: Any = policy.action_net.bias.detach().numpy()[None]
        is_gaussian = isinstance(policy.action_dist, DiagGaussianDistribution)
        self._action_dist = policy.action_dist
        self._log_std = policy.log_std.detach().numpy()[None] if is_gaussian else None

    @classmethod
    def can_act_for(cls, policy: ActorCriticPolicy) -> bool:
        """Whether a policy is nothing but a normaliser (or none), Linear layers, and activations that are known here."""
        if not isinstance(policy, ActorCriticPolicy):  # compiled, for instance
            return False
        own = type(policy)
        extractor = policy.features_extractor
        modules = [policy, policy.mlp_extractor, policy.action_net, extractor, *policy.mlp_extractor.modules()]
        return (
            own.get_distribution is ActorCriticPolicy.get_distribution
            and own.extract_features is ActorCriticPolicy.extract_features
            and own._get_action_dist_from_latent is ActorCriticPolicy._get_action_dist_from_latent
            and (type(policy.action_dist) in _NOISE or _is_gsde_without_squashing(policy.action_dist))
            and policy.device.type == "cpu"
            and isinstance(policy.observation_space, spaces.Box)
            and not is_image_space(policy.observation_space)
            and type(extractor.extractor if type(extractor) is NormalizedExtractor else extractor) is FlattenExtractor
            and policy.pi_features_extractor is extractor
            and type(policy.mlp_extractor) is MlpExtractor
            and all(
                type(module) in cls._ACTIVATIONS or (type(module) is nn.Linear and module.bias is not None)
                for module in (*policy.mlp_extractor.policy_net, policy.action_net)
            )
            and not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        )

    def _sample(self, observations: Observations) -> tuple[np.ndarray, None]:
        assert isinstance(observations, np.ndarray)
        x = observations
        if x.ndim != 2 or x.dtype != np.float32:
            x = x.reshape(len(x), -1).astype(np.float32)
        if self._normalizer is not None:
            x = (x - self._mean) / self._std
            np.minimum(np.maximum(x, -self._normalizer.clip, out=x), self._normalizer.clip, out=x)
        for weight, bias, activate in self._layers:
            if activate is None:
                # Half the time of x @ weight for arrays as small as these
                x = x.dot(weight)
                x += bias
            else:
                activate(x)
        outputs = x.dot(self._weight)
        outputs += self._bias
        if isinstance(self._action_dist, StateDependentNoiseDistribution):
            # As SB3's get_noise() chooses
            one = len(x) == 1 or len(x) != len(self._action_dist.exploration_matrices)
            matrices = self._action_dist.exploration_mat[None] if one else self._action_dist.exploration_matrices
            return check_output(outputs + state_dependent_noise(x, matrices.detach().numpy())), None
        std = None if self._log_std is None else np.exp(self._log_std)
        return self._sample_outputs(self._action_dist, outputs, std), None


def make_actor(policy: ActorCriticPolicy, rng: np.random.Generator) -> Actor:
    """
    The fastest way to sample actions of a policy.

    :param policy: the policy, in evaluation mode
    :param rng: supplies the randomness
    :return: an actor, to be used until the next update
    """
    return MlpActor(policy, rng) if MlpActor.can_act_for(policy) else Actor(policy, rng)


def all_finite(values: np.ndarray) -> bool:
    """
    :param values: any shape and type
    :return: whether no value is NaN or infinite
    """
    if values.dtype.kind != "f":
        return True
    # The sum of squares is finite only if all values are, and costs a third of looking at them; it may overflow, though
    return math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def check_output(values: np.ndarray) -> np.ndarray:
    """
    :param values: what a policy's network returned, or actions made of it
    :return: the same
    :raises ValueError: if a value is NaN or infinite
    """
    if not all_finite(values):
        raise ValueError(f"The policy's output is not finite: {values.tolist()}")
    return values


@contextmanager
def nan_explained() -> Iterator[None]:
    """
    Say what it means when PyTorch refuses to make a distribution of parameters that are NaN.

    :raises ValueError: in the words used everywhere else for it
    """
    try:
        yield
    except ValueError as error:
        if "to satisfy the constraint" not in str(error):
            raise
        raise ValueError(f"The policy's output is not finite: {error}") from error


@contextmanager
def torch_seeded_from(rng: np.random.Generator, device: th.device) -> Iterator[None]:
    """
    Let PyTorch draw from a NumPy generator for a while, and leave its global generators as they were.

    :param rng: supplies the seed; advances by one draw
    :param device: the device on which the drawing happens
    """
    seed = int(rng.integers(2**63))
    with th.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not th.manual_seed, which takes a millisecond to prepare devices that are not there
        th.default_generator.manual_seed(seed)
        if device.type == "cuda":
            th.cuda.manual_seed(seed)
        yield


def reset_noise(policy: ActorCriticPolicy, n_envs: int, rng: np.random.Generator) -> None:
    """
    Sample new gSDE exploration matrices.

    :param policy: a policy with ``use_sde=True``
    :param n_envs: number of matrices, one for each environment
    :param rng: supplies the randomness
    """
    with th.no_grad(), torch_seeded_from(rng, policy.device):
        policy.reset_noise(n_envs)
