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


def kl_divergence(old: Distribution, new: Distribution) -> th.Tensor:
    """
    Kullback-Leibler divergence KL(old || new) in closed form (Kullback & Leibler, 1951).

    :param old: the policy that has collected the batch, in the states of the batch
    :param new: the policy after the step, in the same states
    :return: (n_transitions,) nats, summed over the dimensions of the action (TRPO in sb3-contrib takes their mean)
    """
    divergence = sb3_kl_divergence(old, new)
    return divergence.reshape(len(divergence), -1).sum(dim=1)
