"""The natural gradient and its damping against dense linear algebra, and the length of a step for known functions."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)
from torch import nn

from sb3_reinforce.natural_gradient import (
    DAMPINGS,
    KrylovSpace,
    assign,
    cross_validate,
    divergence_of_signal,
    fisher_vector_product,
    flatten,
    krylov_space,
    length_of_divergence,
    natural_direction,
    natural_step,
)
from sb3_reinforce.returns import kl_divergence

seeds = st.integers(0, 2**32 - 1)


def powers_of_ten(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


def test_assign_is_the_inverse_of_flatten_and_works_in_place():
    parameters = [nn.Parameter(th.randn(2, 3)), nn.Parameter(th.randn(())), nn.Parameter(th.randn(4))]
    before, memory = [parameter.detach().clone() for parameter in parameters], [p.data_ptr() for p in parameters]
    vector = flatten(parameters).detach()
    assign(parameters, th.zeros(11))
    assert not flatten(parameters).any()
    assign(parameters, vector)
    assert all(map(th.equal, parameters, before))
    assert [parameter.data_ptr() for parameter in parameters] == memory


# The Fisher matrix -----------------------------------------------------------------------------------------------------------

KINDS = ["Gaussian", "gSDE", "categorical", "multi-categorical", "bits"]


class Policy(nn.Module):
    """A network in double precision, and the actions and weights of an exact expectation in each state."""

    def __init__(self, kind: str, n_outputs: int, seed: int, has_fixed_std: bool = False):
        super().__init__()
        th.manual_seed(seed)
        self.kind, self.n_outputs = kind, n_outputs
        self.choices = [n_outputs, 2] if kind == "multi-categorical" else [n_outputs]
        self.hidden = nn.Sequential(nn.Linear(2, 3), nn.Tanh()).double()
        self.last = nn.Linear(3, sum(self.choices)).double()
        self.log_std = nn.Parameter(th.randn((3, n_outputs) if kind == "gSDE" else n_outputs, dtype=th.float64) / 2)
        self.log_std.requires_grad_(not has_fixed_std)
        self.unused = nn.Parameter(th.zeros(1, dtype=th.float64))
        self.trained = [parameter for parameter in self.parameters() if parameter.requires_grad]

    def trained_parameters(self) -> list[nn.Parameter]:
        return self.trained

    def distribution(self, states: th.Tensor) -> Distribution:
        latent = self.hidden(states)
        outputs = self.last(latent)
        if self.kind == "Gaussian":
            return DiagGaussianDistribution(self.n_outputs).proba_distribution(outputs, self.log_std)
        if self.kind == "gSDE":
            return StateDependentNoiseDistribution(self.n_outputs).proba_distribution(outputs, self.log_std, latent)
        if self.kind == "multi-categorical":
            return MultiCategoricalDistribution(self.choices).proba_distribution(outputs)
        cls = CategoricalDistribution if self.kind == "categorical" else BernoulliDistribution
        return cls(self.n_outputs).proba_distribution(outputs)

    def evaluate_observations(self, states: th.Tensor) -> tuple[Distribution, th.Tensor]:
        return self.distribution(states), states

    def actions(self, state: th.Tensor) -> list[tuple[th.Tensor, float]]:
        with th.no_grad():
            outputs, distribution = self.last(self.hidden(state))[0], self.distribution(state)
        if self.kind == "bits":
            bits = list(itertools.product([0.0, 1.0], repeat=self.n_outputs))
            p_of_1 = outputs.sigmoid().numpy()
            return [(th.tensor([b]), float(np.prod(np.where(b, p_of_1, 1 - p_of_1)))) for b in bits]
        if "categorical" in self.kind:
            p = [part.softmax(0).tolist() for part in outputs.split(self.choices)]
            rows = itertools.product(*(range(n) for n in self.choices))
            pairs = [(row, math.prod(p[i][a] for i, a in enumerate(row))) for row in rows]
            return [(th.tensor(row if len(row) == 1 else [row]), weight) for row, weight in pairs]
        # Gauss-Hermite quadrature: products of two scores are polynomials of the fourth degree
        nodes, weights = np.polynomial.hermite_e.hermegauss(3)
        std = distribution.distribution.stddev  # type: ignore[union-attr]
        return [
            (outputs + std * th.tensor(nodes[list(i)]), math.prod(weights[list(i)] / weights.sum()))
            for i in itertools.product(range(3), repeat=self.n_outputs)
        ]

    def dense_fisher(self, states: th.Tensor) -> np.ndarray:
        """Mean over the states of the expected outer product of the score with itself."""
        n = sum(parameter.numel() for parameter in self.trained)
        fisher = np.zeros((n, n))
        for state in states.split(1):
            for action, weight in self.actions(state):
                log_prob = self.distribution(state).log_prob(action).sum()
                score = flatten(th.autograd.grad(log_prob, self.trained, materialize_grads=True)).numpy()
                fisher += weight * np.outer(score, score) / len(states)
        return fisher


@settings(max_examples=40)
@given(seeds, st.sampled_from(KINDS), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_fisher_vector_product_equals_the_dense_matrix_times_the_vector(
    seed: int, kind: str, n_outputs: int, n_states: int, has_fixed_std: bool
):
    policy: Any = Policy(kind, n_outputs, seed, has_fixed_std)
    states, counts = th.randn(n_states, 2, dtype=th.float64), th.randint(1, 4, (n_states,))
    product = fisher_vector_product(policy, states, counts)
    fisher = policy.dense_fisher(states.repeat_interleave(counts, dim=0))
    # The graph is kept between products
    for _ in range(2):
        vector = th.randn(len(fisher), dtype=th.float64)
        np.testing.assert_allclose(product(vector), fisher @ vector.numpy(), rtol=1e-8, atol=1e-10)


# The Krylov space ------------------------------------------------------------------------------------------------------------


def singular_matrix(rng: np.random.Generator, n: int, curvature: float = 1.0) -> np.ndarray:
    root = rng.normal(size=(n, (n + 1) // 2)) * np.sqrt(curvature)
    return root @ root.T


def space_of(matrix: np.ndarray, gradient: np.ndarray, max_steps: int, dtype: th.dtype = th.float64) -> KrylovSpace:
    fisher = th.tensor(matrix, dtype=dtype)
    return krylov_space(lambda vector: fisher @ vector, th.tensor(gradient, dtype=dtype), max_steps)


@given(seeds, st.integers(1, 12), st.integers(1, 15), powers_of_ten(-6, 6))
def test_the_basis_is_orthonormal_and_makes_the_matrix_tridiagonal(seed: int, n: int, max_steps: int, curvature: float):
    rng = np.random.default_rng(seed)
    matrix, gradient = singular_matrix(rng, n, curvature), rng.normal(size=n)
    space = space_of(matrix, gradient, max_steps)
    basis, k = space.basis.numpy(), len(space.fisher)
    assert basis.shape == (k, n) and 1 <= k <= min(n, max_steps)
    np.testing.assert_allclose(basis @ basis.T, np.eye(k), atol=1e-9)
    np.testing.assert_allclose(space.fisher, basis @ matrix @ basis.T, atol=1e-5 * np.abs(matrix).max())
    np.testing.assert_array_equal(space.fisher, np.triu(np.tril(space.fisher, 1), -1))
    np.testing.assert_allclose(space.norm * basis[0], gradient, rtol=1e-9)


@given(seeds, st.integers(1, 8), powers_of_ten(-3, 3), powers_of_ten(-15, 15), powers_of_ten(-2, 9))
def test_all_directions_of_a_full_space_equal_dense_solves(seed: int, n: int, curvature: float, size: float, damping: float):
    """In single precision, for any scale of the gradient and of the matrix, which is singular."""
    rng = np.random.default_rng(seed)
    matrix, gradient = singular_matrix(rng, n, curvature), rng.normal(size=n)
    space = space_of(matrix, size * gradient, 50, th.float32)
    dampings = np.append(DAMPINGS, damping)
    for one, coordinates in zip(dampings, space.solve(dampings), strict=True):
        direction, expected = space.direction(one), np.linalg.solve(matrix + one * np.eye(n), gradient)
        assert cosine(direction.numpy(), expected) > 0.999
        np.testing.assert_allclose(space.basis.numpy().T @ coordinates, direction.numpy(), rtol=1e-4, atol=1e-6 * size)


@pytest.mark.parametrize("curvature", [1e-4, 1.0, 1e8])
def test_few_steps_equal_textbook_conjugate_gradients(curvature: float):
    """From 0, with more dimensions than steps."""
    rng = np.random.default_rng(0)
    n, rank, damping, n_steps = 200, 30, 0.1, 10
    root = rng.normal(size=(n, rank)) * np.logspace(0, -1.5, rank) * np.sqrt(curvature / n)
    fisher, gradient = root @ root.T, rng.normal(size=n) + 10 * root @ rng.normal(size=rank) / np.sqrt(curvature)

    solution, residual = np.zeros(n), gradient.copy()
    conjugate = residual.copy()
    for _ in range(n_steps):
        image = fisher @ conjugate + damping * conjugate
        length = residual @ residual / (conjugate @ image)
        solution += length * conjugate
        new = residual - length * image
        conjugate = new + (new @ new) / (residual @ residual) * conjugate
        residual = new
    exact = space_of(fisher, gradient, n_steps).direction(damping).numpy()
    np.testing.assert_allclose(exact, solution, rtol=1e-5, atol=1e-6 * np.abs(solution).max())
    assert cosine(space_of(fisher, gradient, n_steps, th.float32).direction(damping).numpy(), solution) > 0.999


# The damping -----------------------------------------------------------------------------------------------------------------


def dense_scores(fisher: np.ndarray, halves: list[np.ndarray]) -> np.ndarray:
    """Judged and promised improvements, one damping and one half after the other."""
    scores = np.zeros((2, len(DAMPINGS)))
    for i, damping in enumerate(DAMPINGS):
        for own, other in (halves, halves[::-1]):
            direction = np.linalg.solve(fisher + damping * np.eye(len(fisher)), own)
            length = math.sqrt(direction @ fisher @ direction)
            scores[:, i] += other @ direction / length, own @ direction / length
    return scores


@given(seeds, st.integers(1, 8), powers_of_ten(-2, 2), powers_of_ten(-3, 3))
def test_the_damping_has_the_best_mean_score_of_dense_solves(seed: int, n: int, curvature: float, size: float):
    rng = np.random.default_rng(seed)
    fisher, common = singular_matrix(rng, n, curvature), rng.normal(size=n)
    halves = [size * (common + rng.normal(size=n)) for _ in range(2)]
    earlier = size / math.sqrt(curvature) * rng.normal(size=(2, len(DAMPINGS)))
    expected, tensors = dense_scores(fisher, halves), [th.tensor(half) for half in halves]
    close: Any = dict(rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    found = cross_validate(tensors, [space_of(fisher, half, n) for half in halves], DAMPINGS)
    np.testing.assert_allclose(found, expected, **close)
    matrix, whole = th.tensor(fisher), sum(tensors)
    # One part, or a part without a signal, leaves the scores as they are
    for parts, is_new in ((tensors, True), ([whole], False), ([whole, th.zeros(n)], False)):
        arguments = parts, DAMPINGS, earlier, n
        direction, chosen, scores = natural_direction(lambda vector: matrix @ vector, *arguments)
        np.testing.assert_allclose(scores, 0.9 * earlier + 0.1 * expected if is_new else earlier, **close)
        assert chosen == scores[0].argmax()
        assert cosine(direction.numpy(), np.linalg.solve(fisher + DAMPINGS[chosen] * np.eye(n), whole)) > 0.9999


def test_judged_improvements_are_unbiased_and_promised_ones_too_large():
    """
    On a bandit of Gaussian actions with rewards ``slope . a + noise``, whose gradient in the mean is the slope. Means of 1000
    batches, in standard errors.
    """
    rng = np.random.default_rng(0)
    slope, std = np.array([1.0, -0.5, 0.2, 0.0]), np.array([0.3, 1.0, 2.0, 4.0])
    fisher = np.diag(std**-2.0)
    errors = np.zeros((1000, 2, len(DAMPINGS)))
    for error in errors:
        actions = std * rng.normal(size=(2, 20, 4))
        rewards = actions @ slope + rng.normal(size=(2, 20))
        halves = list(np.mean(rewards[:, :, None] * actions / std**2, axis=1))
        spaces = [space_of(fisher, half, 4) for half in halves]
        steps = [space.solve(DAMPINGS) @ space.basis.numpy() for space in spaces]
        true = sum(step @ slope / np.sqrt(np.einsum("di,ij,dj->d", step, fisher, step)) for step in steps)
        error[:] = cross_validate([th.tensor(half) for half in halves], spaces, DAMPINGS) - true
    judged, promised = errors.mean(axis=0) / (errors.std(axis=0) / math.sqrt(len(errors)))
    assert np.abs(judged).max() < 3
    assert promised.min() > 10


def test_the_divergence_grows_with_the_share_of_the_promise_that_is_confirmed():
    """It has bounds, and what is taken for granted becomes less with each update."""
    before = math.inf
    for n in (0, 1, 100, 10_000):
        least, most = divergence_of_signal(-0.3, n), divergence_of_signal(1.0, n)
        assert 0 < least == divergence_of_signal(0.0, n) < before
        assert most == divergence_of_signal(0.25, n) == 0.0125
        assert divergence_of_signal(0.2, 10_000) == pytest.approx(2 * divergence_of_signal(0.1, 10_000))
        before = least


# The step --------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(seeds, st.sampled_from(KINDS), st.integers(2, 3), st.integers(2, 6), powers_of_ten(-6, -2), powers_of_ten(-15, 15))
def test_natural_step_is_against_the_direction_and_has_the_divergence_asked_for(
    seed: int, kind: str, n_outputs: int, n_states: int, target_kl: float, size: float
):
    policy: Any = Policy(kind, n_outputs, seed)
    states, before = th.randn(n_states, 2, dtype=th.float64), flatten(policy.trained).detach()
    with th.no_grad():
        old = policy.distribution(states)

    def divergence() -> float:
        with th.no_grad():
            return kl_divergence(old, policy.distribution(states)).mean().item()

    direction, product = size * th.randn_like(before), fisher_vector_product(policy, states, th.ones(n_states))
    natural_step(policy.trained, direction, product, divergence, target_kl)
    assert cosine(flatten(policy.trained).detach().numpy() - before.numpy(), -direction.numpy()) > 0.99999
    assert divergence() == pytest.approx(target_kl, rel=1e-3)


@pytest.mark.parametrize("is_finite_at_start", [True, False], ids=["after a step", "everywhere"])
def test_a_step_that_leaves_the_policy_undefined_is_not_taken(is_finite_at_start: bool):
    """A ValueError of the divergence: after any step, or even at the old policy."""
    policy: Any = Policy("Gaussian", 2, seed=0)
    states, before = th.randn(3, 2, dtype=th.float64), flatten(policy.trained).detach()

    def divergence() -> float:
        if is_finite_at_start and th.equal(flatten(policy.trained), before):
            return 0.0
        raise ValueError("not finite")

    product = fisher_vector_product(policy, states, th.ones(3))
    natural_step(policy.trained, th.ones_like(before), product, divergence, 0.01)
    assert th.equal(flatten(policy.trained), before)


# The length ------------------------------------------------------------------------------------------------------------------


def length_and_evaluations(divergence_at: Callable[[float], float], target: float, first: float) -> tuple[float, list[float]]:
    """The length that is found for a divergence, and the lengths that were tried."""
    tried: list[float] = []

    def recorded(length: float) -> float:
        tried.append(length)
        return divergence_at(length)

    length_of_divergence(recorded, target, first)
    # The caller is left with the latest evaluation
    found = tried[-1]
    assert tried[0] == first
    assert max(tried) <= 10 * first
    assert len(tried) <= 31
    return found, tried


targets, firsts = powers_of_ten(-4, 0), powers_of_ten(-3, 3)


@given(targets, firsts, powers_of_ten(-0.3, 0.3), st.floats(-0.3, 0.3))
def test_few_evaluations_find_the_length_if_the_divergence_is_almost_quadratic(
    target: float, first: float, error: float, skew: float
):
    def divergence_at(length: float) -> float:
        x = length / (error * first)
        return target * x**2 * math.exp(skew * (x - 1))

    found, tried = length_and_evaluations(divergence_at, target, first)
    assert found == pytest.approx(error * first, rel=1e-3)
    assert len(tried) <= 5


@given(targets, firsts, powers_of_ten(-2, 2), st.floats(0.01, 0.99))
def test_the_longest_step_is_taken_if_the_divergence_never_reaches_the_target(
    target: float, first: float, width: float, most: float
):
    found, tried = length_and_evaluations(
        lambda length: most * target * math.tanh(length / (width * first)) ** 2, target, first
    )
    assert found == max(tried) > first


@pytest.mark.parametrize("beyond", [math.inf, math.nan, 1e6])
@given(targets, firsts, powers_of_ten(-2, 0.9), st.floats(0.01, 0.99))
def test_the_longest_step_below_a_jump_of_the_divergence_is_found(
    beyond: float, target: float, first: float, edge: float, most: float
):
    """To infinity or NaN, if the step cannot be evaluated, or to a large value."""

    def divergence_at(length: float) -> float:
        return most * target * (length / (edge * first)) ** 2 if length <= edge * first else beyond

    found, _ = length_and_evaluations(divergence_at, target, first)
    assert 0.99 * edge * first < found <= edge * first


@pytest.mark.parametrize("value", [math.inf, math.nan, 1.0])
def test_no_step_is_taken_if_the_divergence_of_every_length_is_too_large(value: float):
    assert length_and_evaluations(lambda length: value, 0.01, 1.0)[0] == 0.0
