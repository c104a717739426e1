"""Returns, advantages, loss and divergence against their definitions in plain Python."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)

from sb3_reinforce.returns import (
    action_advantages,
    batch_normalize,
    discounted_returns,
    entropy_loss,
    kl_divergence,
    log_prob,
    monte_carlo_advantages,
    policy_gradient_loss,
    q_advantages,
    steps_since_episode_start,
    td_advantages,
)

rewards = st.floats(-1e6, 1e6, allow_nan=False, width=32)
batches_of_rewards = st.lists(st.lists(rewards, min_size=1, max_size=40), min_size=1, max_size=8)
discounts = st.floats(0.0, 1.0, exclude_min=True)
#: Reward, value of the state and value of the action of each transition
batches_with_critics = st.lists(
    st.lists(st.tuples(rewards, rewards, rewards), min_size=1, max_size=20), min_size=1, max_size=6
)
logits = st.floats(-5, 5, width=32)


def flatten(episodes: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    starts = [step == 0 for episode in episodes for step in range(len(episode))]
    return np.array([reward for episode in episodes for reward in episode]), np.array(starts)


def returns_by_definition(episode: list[float], gamma: float) -> list[float]:
    """G_t = sum over l of gamma^l r_(t+l), term by term."""
    return [sum(gamma**lag * reward for lag, reward in enumerate(episode[start:])) for start in range(len(episode))]


@given(batches_of_rewards, discounts)
def test_returns_follow_the_definition(episodes: list[list[float]], gamma: float):
    expected = [value for episode in episodes for value in returns_by_definition(episode, gamma)]
    scale = max(1.0, max(abs(reward) for episode in episodes for reward in episode))
    np.testing.assert_allclose(discounted_returns(*flatten(episodes), gamma), expected, rtol=1e-12, atol=1e-9 * scale)


@given(batches_of_rewards)
def test_steps_are_counted_from_the_start_of_each_episode(episodes: list[list[float]]):
    expected = [step for episode in episodes for step in range(len(episode))]
    np.testing.assert_array_equal(steps_since_episode_start(flatten(episodes)[1]), expected)


# Advantages ------------------------------------------------------------------------------------------------------------------


def columns(episodes: list[list[tuple[float, float, float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, episode starts, values of states and values of actions of a batch."""
    batch, starts = flatten([[reward for reward, _, _ in episode] for episode in episodes])
    values, action_values = (np.array([row[i] for episode in episodes for row in episode]) for i in (1, 2))
    return batch, starts, values, action_values


def all_advantages(episodes: list[list[tuple[float, float, float]]], gamma: float) -> dict[str, np.ndarray]:
    batch, starts, values, action_values = columns(episodes)
    returns = discounted_returns(batch, starts, gamma)
    return {
        "monte_carlo": monte_carlo_advantages(returns, values),
        "q": q_advantages(action_values),
        "advantage": action_advantages(action_values, values),
        "td": td_advantages(batch, starts, values, gamma),
    }


@given(batches_with_critics, discounts)
def test_advantages_follow_their_definitions(episodes: list[list[tuple[float, float, float]]], gamma: float):
    """G_t - v(s_t), q(s_t, a_t), q(s_t, a_t) - v(s_t), and r_t + gamma v(s_(t+1)) - v(s_t) with v = 0 after the end."""
    expected: dict[str, list[float]] = dict(monte_carlo=[], q=[], advantage=[], td=[])
    for episode in episodes:
        returns = returns_by_definition([reward for reward, _, _ in episode], gamma)
        for step, (reward, value, action_value) in enumerate(episode):
            next_value = episode[step + 1][1] if step + 1 < len(episode) else 0.0
            expected["monte_carlo"].append(returns[step] - value)
            expected["q"].append(action_value)
            expected["advantage"].append(action_value - value)
            expected["td"].append(reward + gamma * next_value - value)
    for name, found in all_advantages(episodes, gamma).items():
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected[name], rtol=1e-9, atol=1e-3 if name == "monte_carlo" else 1e-9)


@given(batches_with_critics, discounts, st.integers(0, 5), st.floats(1, 1e6))
def test_advantages_do_not_depend_on_other_episodes(
    episodes: list[list[tuple[float, float, float]]], gamma: float, changed: int, by: float
):
    others = np.cumsum(columns(episodes)[1]) - 1 != changed % len(episodes)
    shifted = [[(r + by, v - by, q + by) for r, v, q in episode] for episode in episodes]
    one = [new if i == changed % len(episodes) else old for i, (old, new) in enumerate(zip(episodes, shifted, strict=True))]
    before, after = all_advantages(episodes, gamma), all_advantages(one, gamma)
    for name in before:
        np.testing.assert_array_equal(before[name][others], after[name][others])


# Normalization ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=100))
def test_normalized_advantages_follow_the_definition(values: list[float]):
    normalized = batch_normalize(np.array(values))
    if np.ptp(values) == 0:
        np.testing.assert_array_equal(normalized, 0.0)
    else:
        mean = sum(values) / len(values)
        std = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
        np.testing.assert_allclose(normalized, [(value - mean) / (std + 1e-8) for value in values], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.1, 1e300])
@pytest.mark.parametrize("n_transitions", [1, 1000])
def test_equal_advantages_become_exactly_zero(value: float, n_transitions: int):
    np.testing.assert_array_equal(batch_normalize(np.full(n_transitions, value)), 0.0)


# Loss ------------------------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 6), st.integers(2, 4))
def test_the_gradient_of_the_policy_gradient_loss_is_minus_the_policy_gradient(data: st.DataObject, n: int, n_actions: int):
    """Central differences of log pi, weighted by the advantages."""
    theta = data.draw(arrays(np.float64, n_actions, elements=st.floats(-2, 2)))
    states = data.draw(arrays(np.float64, (n, n_actions), elements=st.floats(-1, 1)))
    advantages = data.draw(arrays(np.float64, n, elements=st.floats(-5, 5)))
    actions = data.draw(arrays(np.int64, n, elements=st.integers(0, n_actions - 1)))

    def log_prob(theta: np.ndarray, t: int) -> float:
        scores = [theta[a] * states[t, a] for a in range(n_actions)]
        return scores[actions[t]] - math.log(sum(math.exp(score) for score in scores))

    value = -sum(advantages[t] * log_prob(theta, t) for t in range(n)) / n
    expected = np.zeros(n_actions)
    for i, step in enumerate(1e-6 * np.eye(n_actions)):
        for t in range(n):
            slope = (log_prob(theta + step, t) - log_prob(theta - step, t)) / 2e-6
            expected[i] -= advantages[t] * slope / n
    parameter = th.tensor(theta, requires_grad=True)
    distribution = CategoricalDistribution(n_actions).proba_distribution(parameter * th.tensor(states))
    loss = policy_gradient_loss(distribution.log_prob(th.tensor(actions)), th.tensor(advantages))
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(parameter.grad, expected, atol=1e-6)


@pytest.mark.parametrize("low, high", [(-1, 1), (-0.2, 3), (-np.inf, 0.5), (-np.inf, np.inf)])
@given(st.floats(-3, 3), st.floats(-2, 2))
def test_clipping_keeps_the_expected_policy_gradient_and_reduces_its_variance(
    low: float, high: float, loc: float, log_std: float
):
    """Integrals over normal actions, with advantages that depend on what the environment sees."""
    space, deviations = spaces.Box(low, high, (1,), np.float64), th.linspace(-10, 10, 20_001, dtype=th.float64)
    weights = th.softmax(-(deviations**2) / 2, dim=0)
    actions = loc + math.exp(log_std) * deviations[:, None]
    advantages = th.sin(3 * actions.clamp(low, high)).flatten()
    mean, log_stds = (th.full((len(actions), 1), value, dtype=th.float64, requires_grad=True) for value in (loc, log_std))
    distribution, moments = DiagGaussianDistribution(1).proba_distribution(mean, log_stds), list[th.Tensor]()
    for nats in (log_prob(distribution, actions), log_prob(distribution, actions, space)):
        scores = th.stack(th.autograd.grad(nats.sum(), (mean, log_stds), retain_graph=True)).squeeze(-1)
        moments += [(scores * advantages) @ weights, (scores * advantages) ** 2 @ weights]
    expected, before, gradient, after = moments
    np.testing.assert_allclose(gradient, expected, atol=2e-3)
    assert (after <= before + 2e-3).all()


def test_squashed_actions_are_not_clipped():
    space, actions = spaces.Box(-1, 1, (2,)), th.tensor([[0.9, -0.9]])
    gsde = StateDependentNoiseDistribution(2, squash_output=True)
    gsde.proba_distribution_net(3)
    squashed = gsde.proba_distribution(th.zeros(1, 2), th.zeros(3, 2), th.ones(1, 3))
    assert th.equal(log_prob(squashed, actions, space), squashed.log_prob(actions))


def test_entropy_loss_is_minus_the_mean_entropy_or_its_estimate():
    log_prob, entropy = th.tensor([-1.0, -4.0]), th.tensor([3.0, 5.0])
    assert entropy_loss(log_prob, entropy).item() == -4.0
    assert entropy_loss(log_prob, None).item() == -2.5


# Divergence ------------------------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 4), st.integers(1, 3))
def test_divergence_of_gaussians_is_an_integral(data: st.DataObject, n: int, n_actions: int):
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
    pair = [
        DiagGaussianDistribution(n_actions).proba_distribution(th.tensor(mean), th.tensor(log_std))
        for mean, log_std in zip(means, log_stds, strict=True)
    ]
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
    makers: list[Callable[[], Any]] = [lambda: MultiCategoricalDistribution(dims)]
    if len(dims) == 1:
        makers.append(lambda: CategoricalDistribution(dims[0]))
    for make in makers:
        distributions = [make().proba_distribution(th.tensor(scores)) for scores in pair]
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


@given(arrays(np.float32, (2, 3, 4), elements=st.floats(-200, 200, width=32)), st.integers(0, 3))
def test_divergence_of_actions_whose_probabilities_underflow_is_finite(pair: np.ndarray, n_masked: int):
    p, q = log_softmax(np.stack([pair, 0 * pair], axis=-1).astype(np.float64), axis=-1)
    found = kl_divergence(*(BernoulliDistribution(4).proba_distribution(th.tensor(scores)) for scores in pair))
    np.testing.assert_allclose(found, np.sum(np.exp(p) * (p - q), axis=(-2, -1)), rtol=1e-3, atol=1e-3)
    # Actions that a policy excludes
    pair[:, :, :n_masked] = -np.inf
    p, q = log_softmax(pair[:, :, n_masked:].astype(np.float64), axis=-1)
    found = kl_divergence(*(CategoricalDistribution(4).proba_distribution(th.tensor(scores)) for scores in pair))
    np.testing.assert_allclose(found, np.sum(np.exp(p) * (p - q), axis=-1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("squash", [False, True])
def test_divergence_of_gsde_is_the_mean_log_ratio_of_samples(squash: bool):
    """Statistical, with a fixed seed: within five standard errors."""
    th.manual_seed(0)
    n, distributions = 40_000, list[Distribution]()
    for mean, log_std, latent in zip(th.randn(2, 1, 2) / 2, th.randn(2, 3, 2) / 3 - 1, th.randn(2, 1, 3) / 2, strict=True):
        distribution = StateDependentNoiseDistribution(2, squash_output=squash)
        distribution.proba_distribution_net(3)
        distributions.append(distribution.proba_distribution(mean.expand(n, -1), log_std, latent.expand(n, -1)))
    old, new = distributions
    samples = old.distribution.sample()  # type: ignore[union-attr]
    actions = th.tanh(samples) if squash else samples
    # The inverse of tanh is not exact near 1
    assert actions.abs().max() < 1 - 1e-4 or not squash
    ratios = old.log_prob(actions) - new.log_prob(actions)
    divergence = kl_divergence(old, new)
    assert divergence.shape == (n,)
    assert abs(ratios.mean() - divergence[0]) < 5 * ratios.std() / math.sqrt(n)
    assert divergence[0] > 0.1
