"""The natural gradient against dense linear algebra, and the length of a step for known functions."""

import itertools
import math
from collections.abc import Callable

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
)
from torch import nn

from sb3_reinforce.natural_gradient import (
    InverseTimeDecay,
    assign,
    fisher_vector_product,
    flatten,
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


@given(st.floats(1e-4, 1), st.floats(0.5, 1000), st.integers(0, 10_000))
def test_inverse_time_decay_is_half_after_halving_updates(start: float, halving: float, n: int):
    schedule = InverseTimeDecay(start, halving)
    assert schedule(0) == start
    assert schedule(halving) == pytest.approx(start / 2)  # type: ignore[arg-type]
    # The reciprocal grows linearly
    assert 1 / schedule(n + 1) - 1 / schedule(n) == pytest.approx(1 / (start * halving), rel=1e-3)
    assert repr(schedule) == f"InverseTimeDecay(start={start}, halving={halving})"


@pytest.mark.parametrize("arguments", [(0.0, 50), (math.nan, 50), (math.inf, 50), (0.01, 0), (0.01, math.nan)])
def test_inverse_time_decay_refuses_values_that_are_not_above_0(arguments: tuple[float, float]):
    with pytest.raises(ValueError, match=r"start and halving must be above 0, got InverseTimeDecay\(start="):
        InverseTimeDecay(*arguments)


# The Fisher matrix -----------------------------------------------------------------------------------------------------------


class Policy:
    """A network in double precision, and the actions and weights of an exact expectation in each state."""

    def __init__(self, kind: str, n_outputs: int, seed: int):
        th.manual_seed(seed)
        self.kind, self.n_outputs = kind, n_outputs
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, n_outputs)).double()
        self.log_std = nn.Parameter(th.randn(n_outputs, dtype=th.float64) / 2)
        # The last has no effect; log_std only in Gaussians
        self.parameters = [*self.net.parameters(), self.log_std, nn.Parameter(th.zeros(1, dtype=th.float64))]

    def distribution(self, states: th.Tensor) -> Distribution:
        outputs = self.net(states)
        if self.kind == "Gaussian":
            return DiagGaussianDistribution(self.n_outputs).proba_distribution(outputs, self.log_std)
        cls = CategoricalDistribution if self.kind == "categorical" else BernoulliDistribution
        return cls(self.n_outputs).proba_distribution(outputs)

    def actions(self, state: th.Tensor) -> list[tuple[th.Tensor, float]]:
        with th.no_grad():
            outputs = self.net(state)[0]
        if self.kind == "categorical":
            return [(th.tensor([a]), p.item()) for a, p in enumerate(outputs.softmax(0))]
        if self.kind == "bits":
            bits = list(itertools.product([0.0, 1.0], repeat=self.n_outputs))
            p_of_1 = outputs.sigmoid().numpy()
            return [(th.tensor([b]), float(np.prod(np.where(b, p_of_1, 1 - p_of_1)))) for b in bits]
        # Gauss-Hermite quadrature: products of two scores are polynomials of the fourth degree
        nodes, weights = np.polynomial.hermite_e.hermegauss(3)
        std = self.log_std.detach().exp()
        return [
            (outputs + std * th.tensor(nodes[list(i)]), math.prod(weights[list(i)] / weights.sum()))
            for i in itertools.product(range(3), repeat=self.n_outputs)
        ]

    def dense_fisher(self, states: th.Tensor) -> np.ndarray:
        """Mean over the states of the expected outer product of the score with itself."""
        n = sum(parameter.numel() for parameter in self.parameters)
        fisher = np.zeros((n, n))
        for state in states.split(1):
            for action, weight in self.actions(state):
                log_prob = self.distribution(state).log_prob(action).sum()
                score = flatten(th.autograd.grad(log_prob, self.parameters, materialize_grads=True)).numpy()
                fisher += weight * np.outer(score, score) / len(states)
        return fisher


@settings(max_examples=30)
@given(seeds, st.sampled_from(["Gaussian", "categorical", "bits"]), st.integers(1, 3), st.integers(1, 4))
def test_fisher_vector_product_equals_the_dense_matrix_times_the_vector(seed: int, kind: str, n_outputs: int, n_states: int):
    policy = Policy(kind, n_outputs, seed)
    states = th.randn(n_states, 2, dtype=th.float64)
    with th.no_grad():
        old = policy.distribution(states)
    product = fisher_vector_product(kl_divergence(old, policy.distribution(states)).mean(), policy.parameters)
    fisher = policy.dense_fisher(states)
    # The graph is kept between products
    for _ in range(2):
        vector = th.randn(len(fisher), dtype=th.float64)
        np.testing.assert_allclose(product(vector), fisher @ vector.numpy(), rtol=1e-8, atol=1e-10)


# The direction ---------------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 8), powers_of_ten(-3, 3), powers_of_ten(-15, 15), powers_of_ten(-2, 9))
def test_natural_direction_equals_a_dense_solve(seed: int, n: int, curvature: float, size: float, damping: float):
    """For any scale of the gradient and of the matrix, which is singular."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, (n + 1) // 2)) * np.sqrt(curvature)
    gradient = th.tensor(size * rng.normal(size=n), dtype=th.float32)
    fisher = th.tensor(root @ root.T, dtype=th.float32)
    direction = natural_direction(gradient, lambda vector: fisher @ vector, damping, 50)
    expected = np.linalg.solve(root @ root.T + damping * np.eye(n), gradient.double().numpy() / size)
    assert cosine(direction.numpy(), expected) > 0.999


@pytest.mark.parametrize("curvature", [1e-4, 1.0, 1e8])
def test_few_steps_equal_textbook_conjugate_gradients(curvature: float):
    """From 0, in double precision, with more dimensions than steps: the start of the solver must not affect its result."""
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
    as_float = th.tensor(fisher, dtype=th.float32)
    found = natural_direction(th.tensor(gradient, dtype=th.float32), lambda vector: as_float @ vector, damping, n_steps)
    assert cosine(found.numpy(), solution) > 0.999


def test_natural_direction_is_deterministic_and_leaves_the_global_generator_alone():
    gradient, fisher = th.randn(50), th.randn(50, 50)
    fisher = fisher @ fisher.T
    before = th.get_rng_state()
    one = natural_direction(gradient, lambda vector: fisher @ vector, 0.1, 5)
    assert th.equal(th.get_rng_state(), before)
    th.rand(1)
    assert th.equal(natural_direction(gradient, lambda vector: fisher @ vector, 0.1, 5), one)


# The step --------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    seeds,
    st.sampled_from(["Gaussian", "categorical", "bits"]),
    st.integers(2, 3),
    st.integers(2, 6),
    powers_of_ten(-6, -2),
    powers_of_ten(-3, 3),
)
def test_natural_step_follows_a_dense_solve_to_the_divergence_asked_for(
    seed: int, kind: str, n_outputs: int, n_states: int, target_kl: float, damping: float
):
    policy = Policy(kind, n_outputs, seed)
    states = th.randn(n_states, 2, dtype=th.float64)
    for parameter in policy.parameters:
        parameter.grad = th.randn_like(parameter)
    gradient = flatten(parameter.grad for parameter in policy.parameters).numpy()  # type: ignore[misc]
    fisher, before = policy.dense_fisher(states), flatten(policy.parameters).detach()
    with th.no_grad():
        old = policy.distribution(states)

    def divergence() -> float:
        with th.no_grad():
            return kl_divergence(old, policy.distribution(states)).mean().item()

    curvature = kl_divergence(old, policy.distribution(states)).mean()
    product = fisher_vector_product(curvature, policy.parameters)
    reached = natural_step(policy.parameters, product, divergence, target_kl, damping, max_steps=60)
    step = (flatten(policy.parameters).detach() - before).numpy()
    assert cosine(step, -np.linalg.solve(fisher + damping * np.eye(len(fisher)), gradient)) > 0.999
    assert reached == divergence() == pytest.approx(target_kl, rel=1e-3)


@pytest.mark.parametrize("is_finite_at_start", [True, False], ids=["after a step", "everywhere"])
def test_a_step_that_leaves_the_policy_undefined_is_not_taken(is_finite_at_start: bool):
    """A ValueError of the divergence: after any step, or even at the old policy."""
    policy = Policy("Gaussian", 2, seed=0)
    states = th.randn(3, 2, dtype=th.float64)
    old = policy.distribution(states)
    for parameter in policy.parameters:
        parameter.grad = th.ones_like(parameter)
    before = flatten(policy.parameters).detach()

    def divergence() -> float:
        if is_finite_at_start and th.equal(flatten(policy.parameters), before):
            return 0.0
        raise ValueError("not finite")

    with th.no_grad():
        constant = policy.distribution(states)
    curvature = kl_divergence(constant, old).mean()
    arguments = policy.parameters, fisher_vector_product(curvature, policy.parameters), divergence, 0.01, 0.1, 5
    if is_finite_at_start:
        assert natural_step(*arguments) == 0.0
    else:
        with pytest.raises(ValueError, match="No step along the gradient leaves the policy finite"):
            natural_step(*arguments)
    assert th.equal(flatten(policy.parameters), before)


# The length ------------------------------------------------------------------------------------------------------------------


def length_and_evaluations(divergence_at: Callable[[float], float], target: float, first: float) -> tuple[float, list[float]]:
    """The length that is found for a divergence, and the lengths that were tried."""
    tried: list[float] = []

    def recorded(length: float) -> float:
        tried.append(length)
        return divergence_at(length)

    found, reached = length_of_divergence(recorded, target, first)
    # The caller is left with the latest evaluation
    assert tried[-1] == found
    np.testing.assert_equal(reached, divergence_at(found))
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
