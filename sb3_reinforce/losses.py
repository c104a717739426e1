"""
The loss of REINFORCE, its parts, and the divergence of two policies, as pure functions of tensors.

Every tensor has one row a transition. What SB3 computes per action dimension is summed over the dimensions.
"""

import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.distributions import kl_divergence as sb3_kl_divergence


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


def bounds_loss(means: th.Tensor, stds: th.Tensor, low: th.Tensor, high: th.Tensor) -> th.Tensor:
    """
    Squared distance of Gaussian means from the bounds that actions are clipped to.

    Far outside, every sample is clipped to the same action, so that returns do not say which way to move the mean. The
    ``bounds_loss_coef`` of rl_games penalizes the same (Makoviichuk & Makoviychuk, 2021,
    https://github.com/Denys88/rl_games).

    :param means: (n_transitions, n_actions)
    :param stds: (n_transitions, n_actions) standard deviations, above 0
    :param low: (n_actions,) lower bounds, ``-inf`` for none
    :param high: (n_actions,) upper bounds, ``inf`` for none
    :return: scalar: the squared excess in units of half the range or of the standard deviation, whichever is larger, summed
        over the action dimensions that have both bounds, mean over the transitions
    """
    excess = th.relu(means - high) + th.relu(low - means)
    return (excess / th.maximum((high - low) / 2, stds)).square().sum(dim=1).mean()


def kl_divergence(old: Distribution, new: Distribution) -> th.Tensor:
    """
    Kullback-Leibler divergence KL(old || new) in closed form (Kullback & Leibler, 1951).

    :param old: the policy that has collected the batch, in the states of the batch
    :param new: the policy after the step, in the same states
    :return: (n_transitions,) nats, summed over the dimensions of the action (TRPO in sb3-contrib takes their mean)
    """
    divergence = sb3_kl_divergence(old, new)
    return divergence.reshape(len(divergence), -1).sum(dim=1)
