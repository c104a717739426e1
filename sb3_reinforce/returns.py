"""
Formulas of REINFORCE as pure functions: returns and advantages (NumPy), loss and divergence (PyTorch).

A batch consists of whole episodes, one after the other. Arrays are (n_transitions,), and ``episode_starts`` is True at the
first transition of each episode. Of the four advantage functions, only ``monte_carlo`` is REINFORCE; the others are
actor-critics, which reduce variance at the cost of the critic's bias (Sutton & Barto, 2018, chapter 13; Silver, 2015, lecture
7). Values are fitted to earlier batches.
"""

from typing import Any, Literal

import numpy as np
import torch as th
from stable_baselines3.common import distributions
from stable_baselines3.common.distributions import BernoulliDistribution, CategoricalDistribution, MultiCategoricalDistribution

AdvantageName = Literal["monte_carlo", "q", "advantage", "td"]


def steps_since_episode_start(episode_starts: np.ndarray) -> np.ndarray:
    """Count the transitions that precede each transition in its episode."""
    positions = np.arange(len(episode_starts))
    return positions - np.maximum.accumulate(np.where(episode_starts, positions, 0))


def discounted_returns(rewards: np.ndarray, episode_starts: np.ndarray, gamma: float) -> np.ndarray:
    """
    Monte-Carlo reward-to-go, ``G_t = sum_l gamma^l r_(t+l)`` to the end of the episode (Williams, 1992; Sutton & Barto, 2018,
    section 13.3).

    :param rewards: rewards, in any unit
    :param episode_starts: True at the first transition of each episode
    :param gamma: discount factor, in (0, 1]
    :return: (n_transitions,) float64, in the unit of the rewards
    """
    returns = np.array(rewards, dtype=np.float64)
    is_last = np.append(episode_starts[1:], True)
    following = 0.0
    for step in range(len(returns) - 1, -1, -1):
        following = returns[step] + (0.0 if is_last[step] else gamma * following)
        returns[step] = following
    return returns


def monte_carlo_advantages(returns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """
    ``G_t - v(s_t)``: REINFORCE with a baseline (Williams, 1992; Sutton & Barto, 2018, section 13.4), which is unbiased if the
    values do not depend on the actions of the batch.
    """
    return returns - values


def q_advantages(action_values: np.ndarray) -> np.ndarray:
    """
    ``q(s_t, a_t)``: Q actor-critic (Sutton et al., 2000, "Policy gradient methods for reinforcement learning with function
    approximation"). The critic's error, which is printed at times, has a mean of 0: nothing would be learned.
    """
    return action_values


def action_advantages(action_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``q(s_t, a_t) - v(s_t)``: advantage actor-critic (Baird, 1993, "Advantage updating"; Sutton et al., 2000)."""
    return action_values - values


def td_advantages(rewards: np.ndarray, episode_starts: np.ndarray, values: np.ndarray, gamma: float) -> np.ndarray:
    """
    ``r_t + gamma v(s_(t+1)) - v(s_t)``, with ``v = 0`` after the end of an episode: TD actor-critic (Witten, 1977; Sutton &
    Barto, 2018, section 13.5). At a time limit, the last reward may include the value of the last observation.
    """
    is_last = np.append(episode_starts[1:], True)
    next_values = np.where(is_last, 0.0, np.append(values[1:], 0.0))
    return rewards + gamma * next_values - values


def batch_normalize(advantages: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    """
    Shift and scale advantages to mean 0 and standard deviation 1 over the batch (Mnih & Gregor, 2014, section 2.3).

    :param advantages: advantages, in the unit of the rewards
    :param eps: added to the population standard deviation, in the same unit
    :return: (n_transitions,) float64, dimensionless; 0 if all advantages are equal
    """
    advantages = np.asarray(advantages, dtype=np.float64)
    if np.ptp(advantages) == 0.0:
        return np.zeros_like(advantages)
    centered = advantages - advantages.mean()
    return centered / (centered.std() + eps)


def log_prob(distribution: distributions.Distribution, actions: th.Tensor, space: Any = None) -> th.Tensor:
    """
    Log-probability of what the environment sees of sampled actions: a normal action beyond a bound has the log-probability of
    everything beyond it. The expected policy gradient is the same as that of the sampled actions, and its variance is lower
    (Fujita & Maeda, 2018, "Clipped action policy gradient", https://arxiv.org/abs/1802.07564).

    :param actions: (n_transitions, ...) actions before they are clipped
    :param space: space to whose bounds normal actions are clipped, None for the density of the samples
    :return: (n_transitions,) nats. Squashed actions are never clipped
    """
    is_normal = type(distribution) in (distributions.DiagGaussianDistribution, distributions.StateDependentNoiseDistribution)
    if space is None or not is_normal or getattr(distribution, "bijector", None):
        return distribution.log_prob(actions)
    normal: Any = distribution.distribution
    clipped = actions.clamp(*(th.as_tensor(bound).to(actions).flatten() for bound in (space.low, space.high)))
    deviations = (clipped - normal.loc) / normal.scale
    beyond = th.special.log_ndtr(th.where(actions > clipped, -deviations, deviations))
    return distributions.sum_independent_dims(th.where(actions == clipped, normal.log_prob(actions), beyond))


def policy_gradient_loss(log_prob: th.Tensor, advantages: th.Tensor) -> th.Tensor:
    """``-mean(log pi(a|s) A)``, the gradient of which is the negative policy gradient (Williams, 1992)."""
    return -(advantages * log_prob).mean()


def entropy_loss(log_prob: th.Tensor, entropy: th.Tensor | None) -> th.Tensor:
    """Negative mean entropy in nats (Williams & Peng, 1991), as in A2C; None for one estimated by log-probabilities."""
    return log_prob.mean() if entropy is None else -entropy.mean()


def kl_divergence(old: distributions.Distribution, new: distributions.Distribution) -> th.Tensor:
    """
    Kullback-Leibler divergence KL(old || new) (Kullback & Leibler, 1951) of action distributions in the same states.

    :return: (n_transitions,) nats, summed over action dimensions (sb3-contrib's TRPO takes their mean)
    """
    if type(old) not in (BernoulliDistribution, CategoricalDistribution, MultiCategoricalDistribution):
        return distributions.kl_divergence(old, new).unsqueeze(-1).flatten(1).sum(dim=1)
    # PyTorch's divergence is infinite where a probability underflows, but its logarithm does not
    p, q = map(_log_probs, (old.distribution, new.distribution))
    return (p.exp() * (p - q)).masked_fill(p.exp() == 0, 0).sum(dim=1)


def _log_probs(parts: Any) -> th.Tensor:
    """(n_transitions, n_probabilities) log-probabilities of discrete actions."""
    if isinstance(parts, th.distributions.Bernoulli):
        return th.cat([th.nn.functional.logsigmoid(logits) for logits in (parts.logits, -parts.logits)], dim=1)
    return th.cat([part.logits for part in parts], dim=1) if isinstance(parts, list) else parts.logits
