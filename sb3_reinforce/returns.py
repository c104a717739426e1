"""
Returns and advantages of whole episodes, as pure functions of NumPy arrays; the loss and the divergence of two policies, as
pure functions of tensors with one row a transition.

A batch is a row of whole episodes, one behind the other: every array has one entry a transition, and ``episode_starts``
marks the first transition of each episode. All sums are done in float64.

The four advantage functions differ in what stands for the worth of an action. Only the first is REINFORCE, which learns from
what did happen; the other three are actor-critics, which learn from what a critic expects. They trade the variance of returns
for the errors of the critic (Sutton & Barto, 2018, chapter 13; Silver, 2015, lecture 7).
"""

from typing import Literal

import numpy as np
import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.distributions import kl_divergence as sb3_kl_divergence

AdvantageName = Literal["monte_carlo", "q", "advantage", "td"]


def steps_to_episode_end(episode_starts: np.ndarray) -> np.ndarray:
    """
    Count, for every transition, how many transitions of its episode follow it.

    :param episode_starts: (n_transitions,) True at the first transition of each episode; the first entry must be True
    :return: (n_transitions,) integers, 0 at the last transition of an episode
    :raises ValueError: if the batch is empty, or does not begin with an episode's first transition
    """
    episode_starts = np.asarray(episode_starts, dtype=bool)
    if episode_starts.size == 0 or not episode_starts[0]:
        raise ValueError(
            "A batch must hold at least one transition and begin with the first transition of an episode, "
            f"got episode_starts={episode_starts}"
        )
    starts = np.flatnonzero(episode_starts)
    ends = np.append(starts[1:], episode_starts.size)
    return np.repeat(ends, ends - starts) - 1 - np.arange(episode_starts.size)


def discounted_returns(rewards: np.ndarray, episode_starts: np.ndarray, gamma: float) -> np.ndarray:
    """
    Monte-Carlo reward-to-go, ``G_t = sum_l gamma^l r_(t+l)`` up to the end of the episode that t belongs to
    (Williams, 1992; Sutton & Barto, 2018, section 13.3).

    Recursive doubling: once each entry holds the discounted sum of its next ``n`` rewards, adding ``gamma^n`` times the
    entry ``n`` steps ahead makes that ``2 n``. The number of passes over the batch is the binary logarithm of the longest
    episode (Hillis & Steele, 1986, "Data parallel algorithms").

    :param rewards: (n_transitions,) rewards of whole episodes, any unit
    :param episode_starts: (n_transitions,) True at the first transition of each episode
    :param gamma: discount factor per step, in (0, 1]
    :return: (n_transitions,) float64, same unit as the rewards
    """
    remaining = steps_to_episode_end(episode_starts)
    returns = np.array(rewards, dtype=np.float64)
    span, discount, longest = 1, gamma, remaining.max()
    while span <= longest:
        returns[:-span] += np.where(remaining[:-span] >= span, discount * returns[span:], 0.0)
        span, discount = 2 * span, discount * discount
    return returns


def monte_carlo_advantages(returns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """
    ``G_t - v(s_t)``: REINFORCE with a baseline (Williams, 1992; Sutton & Barto, 2018, section 13.4).

    The policy gradient is unbiased whatever the values, as long as they do not depend on the actions of the batch. The better
    they are, the smaller is its variance.

    :param returns: (n_transitions,) discounted returns
    :param values: (n_transitions,) state values, fitted to other batches
    :return: (n_transitions,)
    """
    return returns - values


def q_advantages(action_values: np.ndarray) -> np.ndarray:
    """
    ``q(s_t, a_t)``: the Q actor-critic (Sutton et al., 2000, "Policy gradient methods for reinforcement learning with function
    approximation"; Silver, 2015, lecture 7).

    No chance of later steps is in it, but all errors of the critic, and how much the values of states vary. It is also found
    printed as ``q(s, a) - q(s, a, w)``: that is the error of the critic, whose mean is 0 for a good one, so that nothing would
    be learned.

    :param action_values: (n_transitions,) values of the actions taken, fitted to other batches
    :return: (n_transitions,)
    """
    return action_values


def action_advantages(action_values: np.ndarray, values: np.ndarray) -> np.ndarray:
    """
    ``q(s_t, a_t) - v(s_t)``: the advantage actor-critic (Baird, 1993, "Advantage updating"; Sutton et al., 2000).

    As :func:`q_advantages` without the variance of the values of states, which adds nothing to the mean of the gradient.

    :param action_values: (n_transitions,) values of the actions taken, fitted to other batches
    :param values: (n_transitions,) state values, fitted to other batches
    :return: (n_transitions,)
    """
    return action_values - values


def td_advantages(rewards: np.ndarray, episode_starts: np.ndarray, values: np.ndarray, gamma: float) -> np.ndarray:
    """
    ``r_t + gamma v(s_(t+1)) - v(s_t)``, where ``v`` is 0 after the last transition of an episode: the TD actor-critic (Witten,
    1977; Sutton & Barto, 2018, section 13.5).

    The chance of one step is in it, and what the values of two states that follow each other have wrong.

    :param rewards: (n_transitions,) rewards of whole episodes; the last of one that has timed out may hold the value of what
        would have followed
    :param episode_starts: (n_transitions,) True at the first transition of each episode
    :param values: (n_transitions,) state values, fitted to other batches
    :param gamma: discount factor per step, in (0, 1]
    :return: (n_transitions,)
    """
    is_last = np.append(episode_starts[1:], True)
    next_values = np.where(is_last, 0.0, np.append(values[1:], 0.0))
    return rewards + gamma * next_values - values


def batch_normalize(advantages: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    """
    Shift and scale advantages to mean 0 and standard deviation 1 over the batch.

    This makes the size of a policy update independent of the unit of the rewards (Mnih & Gregor, 2014, section 2.3). When
    all advantages are equal the batch prefers no action to any other, so the result is exactly zero.

    :param advantages: (n_transitions,) advantages of one batch, in the unit of the rewards
    :param eps: added to the population standard deviation so that a tiny spread is not blown up, same unit
    :return: (n_transitions,) float64, dimensionless
    """
    advantages = np.asarray(advantages, dtype=np.float64)
    if np.ptp(advantages) == 0.0:
        return np.zeros_like(advantages)
    centered = advantages - advantages.mean()
    return centered / (centered.std() + eps)


def policy_gradient_loss(log_prob: th.Tensor, advantages: th.Tensor) -> th.Tensor:
    """
    ``-mean(log pi(a|s) A)``, whose gradient is the negative policy gradient (Williams, 1992; Sutton & Barto, 2018, ch. 13).

    :param log_prob: (n_transitions,) log-probabilities of the actions, with gradients
    :param advantages: (n_transitions,) how much better each action was than expected
    :return: scalar
    """
    return -(advantages * log_prob).mean()


def entropy_loss(log_prob: th.Tensor, entropy: th.Tensor | None) -> th.Tensor:
    """
    Negative mean entropy of the policy (Williams & Peng, 1991), as in SB3's A2C.

    :param log_prob: (n_transitions,) log-probabilities of the actions: their negative estimates the entropy if it has no
        closed form
    :param entropy: (n_transitions,) or None, nats
    :return: scalar
    """
    return log_prob.mean() if entropy is None else -entropy.mean()


def kl_divergence(old: Distribution, new: Distribution) -> th.Tensor:
    """
    Kullback-Leibler divergence KL(old || new) in closed form (Kullback & Leibler, 1951).

    :param old: the policy that has collected the batch, in the states of the batch
    :param new: the policy after the step, in the same states
    :return: (n_transitions,) nats, summed over the dimensions of the action (TRPO in sb3-contrib takes their mean)
    """
    divergence = sb3_kl_divergence(old, new)
    return divergence.reshape(len(divergence), -1).sum(dim=1)
