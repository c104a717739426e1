"""
Acting: observations in, sampled actions out, as NumPy arrays. No value, no log-probability, no autograd.

All randomness comes from a NumPy generator, so that actions are a function of the weights, the observations and that
generator, and no global generator is touched.
"""

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
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_reinforce.policies import NormalizedExtractor

Observations = np.ndarray | dict[str, np.ndarray]


def gaussian_actions(mean: np.ndarray, std: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    Sample from diagonal Gaussians.

    :param mean: (n_envs, n_actions)
    :param std: (n_envs, n_actions), above 0
    :param rng: supplies n_envs x n_actions standard normal numbers
    :return: (n_envs, n_actions)
    """
    return mean + std * rng.standard_normal(mean.shape, dtype=mean.dtype)


def categorical_actions(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    Sample from softmax distributions: the largest of the logits plus Gumbel noise (Gumbel, 1954; Maddison et al., 2014).

    :param logits: (n_envs, n_choices) log-probabilities up to a constant a row
    :param rng: supplies n_envs x n_choices Gumbel numbers
    :return: (n_envs,) integers below n_choices
    """
    return np.argmax(logits + rng.gumbel(size=logits.shape), axis=-1)


def bernoulli_actions(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    Sample independent bits: 1 where the logit plus logistic noise is positive.

    :param logits: (n_envs, n_bits) log-odds of a 1
    :param rng: supplies n_envs x n_bits logistic numbers
    :return: (n_envs, n_bits) of 0 and 1
    """
    return (logits + rng.logistic(size=logits.shape) > 0).astype(np.int8)


def sample_outputs(
    action_dist: Distribution, outputs: np.ndarray, std: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """
    Sample one action for each row of the outputs of a policy network.

    :param action_dist: SB3 distribution of the policy, one of ``_SAMPLED_HERE``
    :param outputs: (n_envs, n_outputs) means for Gaussians, logits for everything else
    :param std: (n_actions,) standard deviations of Gaussians
    :param rng: supplies the randomness
    :return: (n_envs, ...) actions
    :raises ValueError: when an output is NaN or infinite
    """
    if not np.logical_and.reduce(np.isfinite(outputs), axis=None):
        raise ValueError(f"The policy's output is not finite: {outputs.tolist()}")
    if isinstance(action_dist, DiagGaussianDistribution):
        assert std is not None
        return gaussian_actions(outputs, std, rng)
    if isinstance(action_dist, CategoricalDistribution):
        return categorical_actions(outputs, rng)
    if isinstance(action_dist, MultiCategoricalDistribution):
        splits = np.split(outputs, np.cumsum(action_dist.action_dims)[:-1], axis=1)
        return np.stack([categorical_actions(logits, rng) for logits in splits], axis=1)
    return bernoulli_actions(outputs, rng)


#: Distributions whose samples are drawn by sample_outputs. Exactly these: a subclass may sample differently
_SAMPLED_HERE = (DiagGaussianDistribution, CategoricalDistribution, MultiCategoricalDistribution, BernoulliDistribution)


class Actor:
    """
    Samples actions of any policy, through PyTorch.

    :param policy: the policy, in evaluation mode
    """

    def __init__(self, policy: ActorCriticPolicy):
        self.policy = policy

    def __call__(self, observations: Observations, rng: np.random.Generator) -> np.ndarray:
        """
        :param observations: (n_envs, ...) as a ``VecEnv`` returns them
        :param rng: supplies the randomness
        :return: (n_envs, *action shape) as sampled, not yet clipped or unscaled to the bounds of the action space
        :raises ValueError: when the policy's output is NaN or infinite
        """
        with th.no_grad():
            obs_tensor = obs_as_tensor(observations, self.policy.device)
            with nan_explained():
                distribution = self.policy.get_distribution(obs_tensor)
            actions = self._sample(distribution, rng)
        return actions.reshape((-1, *self.policy.action_space.shape))  # type: ignore[misc]

    def _sample(self, distribution: Distribution, rng: np.random.Generator) -> np.ndarray:
        if type(distribution) not in _SAMPLED_HERE:
            with torch_seeded_from(rng, self.policy.device):
                actions = distribution.get_actions().cpu().numpy()
            if not np.isfinite(actions).all():
                raise ValueError(f"The policy's output is not finite: it chose the actions {actions.tolist()}")
            return actions
        parts: Any = distribution.distribution
        if isinstance(distribution, DiagGaussianDistribution):
            return sample_outputs(distribution, parts.mean.cpu().numpy(), parts.stddev.cpu().numpy(), rng)
        logits = th.cat([part.logits for part in parts], dim=1) if isinstance(parts, list) else parts.logits
        return sample_outputs(distribution, logits.cpu().numpy(), None, rng)


class MlpActor(Actor):
    """
    Samples actions of a plain multi-layer perceptron on the CPU with NumPy, which sees the same memory: for networks of a few
    dozen units, PyTorch's cost per call is many times that of the arithmetic. Same actions as :class:`Actor`, up to rounding.

    :param policy: a policy that :meth:`can_act_for` accepts, in evaluation mode
    """

    _ACTIVATIONS: ClassVar[dict[type[nn.Module], Callable[..., Any]]] = {
        nn.ReLU: lambda x: np.maximum(x, 0, out=x),
        nn.Tanh: lambda x: np.tanh(x, out=x),
    }

    def __init__(self, policy: ActorCriticPolicy):
        super().__init__(policy)
        self._clip = 0.0
        extractor = policy.features_extractor
        if isinstance(extractor, NormalizedExtractor):
            self._clip = extractor.normalizer.clip
            self._mean, self._std = (x.numpy().ravel() for x in extractor.normalizer.shift_and_scale("", th.float32))
        self._layers = [
            (module.weight.detach().numpy().T, module.bias.detach().numpy())
            if isinstance(module, nn.Linear)
            else self._ACTIVATIONS[type(module)]
            for module in (*policy.mlp_extractor.policy_net, policy.action_net)
        ]
        is_gaussian = isinstance(policy.action_dist, DiagGaussianDistribution)
        self._log_std = policy.log_std.detach().numpy() if is_gaussian else None

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
            and own._get_action_dist_from_latent is ActorCriticPolicy._get_action_dist_from_latent
            and type(policy.action_dist) in _SAMPLED_HERE
            and policy.device.type == "cpu"
            and isinstance(policy.observation_space, spaces.Box)
            and not is_image_space(policy.observation_space)
            and type(extractor.extractor if type(extractor) is NormalizedExtractor else extractor) is FlattenExtractor
            and policy.pi_features_extractor is extractor
            and type(policy.mlp_extractor) is MlpExtractor
            and type(policy.action_net) is nn.Linear
            and all(
                type(module) is nn.Linear or type(module) in cls._ACTIVATIONS for module in policy.mlp_extractor.policy_net
            )
            and not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        )

    def __call__(self, observations: Observations, rng: np.random.Generator) -> np.ndarray:
        assert isinstance(observations, np.ndarray)
        x = observations.reshape(len(observations), -1).astype(np.float32)
        if self._clip:
            x -= self._mean
            x /= self._std
            np.minimum(np.maximum(x, -self._clip, out=x), self._clip, out=x)
        for layer in self._layers:
            if isinstance(layer, tuple):
                x = x @ layer[0]
                x += layer[1]
            else:
                layer(x)
        std = None if self._log_std is None else np.exp(self._log_std)
        actions = sample_outputs(self.policy.action_dist, x, std, rng)
        return actions.reshape((-1, *self.policy.action_space.shape))  # type: ignore[misc]


def make_actor(policy: ActorCriticPolicy) -> Actor:
    """
    The fastest way to sample actions of a policy as long as its weights stay as they are.

    :param policy: the policy, in evaluation mode
    :return: an actor, to be used until the next update
    """
    return MlpActor(policy) if MlpActor.can_act_for(policy) else Actor(policy)


def actions_for_env(policy: ActorCriticPolicy, actions: np.ndarray) -> np.ndarray:
    """
    What an environment gets for sampled actions, as in SB3: unscaled when the policy squashes them, else clipped.

    :param policy: the policy that sampled them
    :param actions: (n_envs, *action shape)
    :return: (n_envs, *action shape) within the bounds of the action space
    """
    if not isinstance(policy.action_space, spaces.Box):
        return actions
    if policy.squash_output:
        return policy.unscale_action(actions)
    # What np.clip does, in a third of the time for a handful of numbers
    return np.minimum(np.maximum(actions, policy.action_space.low), policy.action_space.high)


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
