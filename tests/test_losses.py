"""The loss, its parts and the divergence, against slow references and their definitions."""

import math

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)

from sb3_reinforce.returns import entropy_loss, kl_divergence, policy_gradient_loss

numbers = st.floats(-100, 100, width=32)
logits = st.floats(-5, 5, width=32)


def vectors(data: st.DataObject, n: int) -> np.ndarray:
    return data.draw(arrays(np.float64, n, elements=numbers))


@given(st.data(), st.integers(1, 20))
def test_policy_gradient_loss_is_the_negative_mean_of_weighted_log_probabilities(data: st.DataObject, n: int):
    log_prob, advantages = vectors(data, n), vectors(data, n)
    expected = 0.0
    for t in range(n):
        expected -= float(log_prob[t]) * float(advantages[t]) / n
    loss = policy_gradient_loss(th.tensor(log_prob), th.tensor(advantages))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(st.data(), st.integers(1, 6), st.integers(2, 4))
def test_the_gradient_of_the_policy_gradient_loss_is_minus_the_policy_gradient(data: st.DataObject, n: int, n_actions: int):
    """Numerically: central differences of log pi, weighted by the advantages."""
    theta = data.draw(arrays(np.float64, n_actions, elements=st.floats(-2, 2)))
    states = data.draw(arrays(np.float64, (n, n_actions), elements=st.floats(-1, 1)))
    advantages = data.draw(arrays(np.float64, n, elements=st.floats(-5, 5)))
    actions = data.draw(arrays(np.int64, n, elements=st.integers(0, n_actions - 1)))

    def log_prob(theta: np.ndarray, t: int) -> float:
        scores = [theta[a] * states[t, a] for a in range(n_actions)]
        return scores[actions[t]] - math.log(sum(math.exp(score) for score in scores))

    expected = np.zeros(n_actions)
    for i, step in enumerate(1e-6 * np.eye(n_actions)):
        for t in range(n):
            slope = (log_prob(theta + step, t) - log_prob(theta - step, t)) / 2e-6
            expected[i] -= advantages[t] * slope / n
    parameter = th.tensor(theta, requires_grad=True)
    distribution = CategoricalDistribution(n_actions).proba_distribution(parameter * th.tensor(states))
    policy_gradient_loss(distribution.log_prob(th.tensor(actions)), th.tensor(advantages)).backward()
    np.testing.assert_allclose(parameter.grad, expected, atol=1e-6)


@given(st.data(), st.integers(1, 20), st.booleans())
def test_entropy_loss_is_minus_the_mean_entropy_or_its_estimate(data: st.DataObject, n: int, closed_form: bool):
    log_prob, entropy = vectors(data, n), vectors(data, n)
    loss = entropy_loss(th.tensor(log_prob), th.tensor(entropy) if closed_form else None)
    expected = -sum(map(float, entropy)) / n if closed_form else sum(map(float, log_prob)) / n
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


# The divergence --------------------------------------------------------------------------------------------------------------


def gaussian(n_actions: int, mean: np.ndarray, log_std: np.ndarray) -> DiagGaussianDistribution:
    return DiagGaussianDistribution(n_actions).proba_distribution(th.tensor(mean), th.tensor(log_std))


@given(st.data(), st.integers(1, 4), st.integers(1, 3))
def test_divergence_of_gaussians(data: st.DataObject, n: int, n_actions: int):
    means = data.draw(arrays(np.float64, (2, n, n_actions), elements=st.floats(-3, 3)))
    log_stds = data.draw(arrays(np.float64, (2, n_actions), elements=st.floats(-2, 1)))
    expected = np.zeros(n)
    for t, i in np.ndindex(n, n_actions):
        # The integral of p log(p / q), on a fine grid over ten standard deviations of p
        std, other_std = np.exp(log_stds[:, i])
        x = np.linspace(means[0, t, i] - 10 * std, means[0, t, i] + 10 * std, 2001)
        log_p = -0.5 * ((x - means[0, t, i]) / std) ** 2 - np.log(std)
        log_q = -0.5 * ((x - means[1, t, i]) / other_std) ** 2 - np.log(other_std)
        p = np.exp(log_p) / np.sqrt(2 * np.pi)
        expected[t] += np.sum(p * (log_p - log_q)) * (x[1] - x[0])
    pair = [gaussian(n_actions, mean, log_std) for mean, log_std in zip(means, log_stds, strict=True)]
    np.testing.assert_allclose(kl_divergence(*pair), expected, rtol=1e-6, atol=1e-9)


def softmax(scores: np.ndarray) -> list[float]:
    weights = [math.exp(score) for score in scores]
    return [weight / sum(weights) for weight in weights]


@given(st.data(), st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_divergence_of_categorical_actions_is_a_sum_over_all_of_them(data: st.DataObject, n: int, dims: list[int]):
    pair = data.draw(arrays(np.float64, (2, n, sum(dims)), elements=logits))
    expected = np.zeros(n)
    starts = np.cumsum([0, *dims[:-1]])
    for t in range(n):
        for start, dim in zip(starts, dims, strict=True):
            p, q = (softmax(scores[t, start : start + dim]) for scores in pair)
            expected[t] += sum(p[a] * math.log(p[a] / q[a]) for a in range(dim))
    distributions: list[Distribution] = [
        MultiCategoricalDistribution(dims).proba_distribution(th.tensor(scores)) for scores in pair
    ]
    np.testing.assert_allclose(kl_divergence(*distributions), expected, rtol=1e-6, atol=1e-9)
    if len(dims) == 1:
        distributions = [CategoricalDistribution(dims[0]).proba_distribution(th.tensor(scores)) for scores in pair]
        np.testing.assert_allclose(kl_divergence(*distributions), expected, rtol=1e-6, atol=1e-9)


@given(st.data(), st.integers(1, 4), st.integers(1, 3))
def test_divergence_of_bits_is_a_sum_over_all_combinations(data: st.DataObject, n: int, n_bits: int):
    pair = data.draw(arrays(np.float64, (2, n, n_bits), elements=logits))
    expected = np.zeros(n)
    for t in range(n):
        p_of_1, q_of_1 = (1 / (1 + np.exp(-scores[t])) for scores in pair)
        for bits in np.ndindex(*[2] * n_bits):
            p, q = (math.prod(x if bit else 1 - x for bit, x in zip(bits, of_1, strict=True)) for of_1 in (p_of_1, q_of_1))
            expected[t] += p * math.log(p / q)
    distributions = [BernoulliDistribution(n_bits).proba_distribution(th.tensor(scores)) for scores in pair]
    np.testing.assert_allclose(kl_divergence(*distributions), expected, rtol=1e-6, atol=1e-9)


def gsde(mean: th.Tensor, log_std: th.Tensor, latent: th.Tensor, squash: bool) -> StateDependentNoiseDistribution:
    distribution = StateDependentNoiseDistribution(mean.shape[1], squash_output=squash)
    distribution.proba_distribution_net(latent.shape[1])
    return distribution.proba_distribution(mean, log_std, latent)


@pytest.mark.parametrize("squash", [False, True])
def test_divergence_of_gsde_is_the_mean_log_ratio_of_samples(squash: bool):
    """Statistical, with a fixed seed: five standard errors. The log-probabilities are those of SB3, squashed or not."""
    th.manual_seed(0)
    n = 40_000
    means, log_stds, latents = th.randn(2, 1, 2) / 2, th.randn(2, 3, 2) / 3 - 1, th.randn(2, 1, 3) / 2
    old, new = (
        gsde(mean.expand(n, -1), log_std, latent.expand(n, -1), squash)
        for mean, log_std, latent in zip(means, log_stds, latents, strict=True)
    )
    samples = old.distribution.sample()
    actions = th.tanh(samples) if squash else samples
    # The inverse of tanh is not exact near 1
    assert actions.abs().max() < 1 - 1e-4 or not squash
    ratios = old.log_prob(actions) - new.log_prob(actions)
    divergence = kl_divergence(old, new)
    assert divergence.shape == (n,)
    assert abs(ratios.mean() - divergence[0]) < 5 * ratios.std() / math.sqrt(n)
    assert divergence[0] > 0.1


@given(st.data(), st.integers(1, 4), st.integers(1, 3))
def test_divergence_from_itself_is_zero_and_from_others_positive(data: st.DataObject, n: int, n_actions: int):
    scores = th.tensor(data.draw(arrays(np.float64, (n, n_actions), elements=logits)))
    shifted = scores + th.arange(n_actions) + 0.5
    log_std = th.zeros(n_actions, dtype=th.float64)
    for make in (
        lambda s: CategoricalDistribution(n_actions).proba_distribution(s),
        lambda s: BernoulliDistribution(n_actions).proba_distribution(s),
        lambda s: DiagGaussianDistribution(n_actions).proba_distribution(s, log_std),
    ):
        divergence = kl_divergence(make(scores), make(scores))
        assert divergence.shape == (n,)
        np.testing.assert_allclose(divergence, 0, atol=1e-12)
        if not (n_actions == 1 and isinstance(make(scores), CategoricalDistribution)):
            assert (kl_divergence(make(scores), make(shifted)) > 1e-9).all()
