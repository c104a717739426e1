"""
The natural gradient, and the length of a step along it.

It improves the policy most per change of its action distributions, whatever its parameters are (Amari, 1998; Kakade, 2001, "A
natural policy gradient"; Peters & Schaal, 2008). Conjugate gradients compute it without the Fisher matrix, and a divergence
sets the length, as in truncated natural policy gradients (Duan et al., 2016, https://arxiv.org/abs/1604.06778).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch as th
from sb3_contrib.common.utils import conjugate_gradient_solver
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.nn.attention import SDPBackend, sdpa_kernel

from sb3_reinforce.episodes.schedule import torch_seeded_from
from sb3_reinforce.policies import BaselinePolicy
from sb3_reinforce.returns import kl_divergence


@dataclass(frozen=True)
class InverseTimeDecay:
    """
    Schedule over updates, ``start / (1 + n_updates / halving)`` (Robbins & Monro, 1951, "A stochastic approximation method").

    :param start: value at the first update, above 0
    :param halving: number of updates until half of it, above 0
    """

    start: float
    halving: float

    def __post_init__(self) -> None:
        if not (0 < self.start < math.inf and 0 < self.halving):
            raise ValueError(f"start and halving must be above 0, got {self}")

    def __call__(self, n_updates: int) -> float:
        return self.start / (1 + n_updates / self.halving)


def flatten(tensors: Iterable[th.Tensor]) -> th.Tensor:
    """Concatenate tensors into one vector."""
    return th.cat([tensor.flatten() for tensor in tensors])


@th.no_grad()
def assign(parameters: Sequence[th.Tensor], vector: th.Tensor) -> None:
    """Set parameters to the entries of a vector, in place, because NumPy may share their memory."""
    for parameter, values in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(values.view_as(parameter))


@th.enable_grad()
def self_divergence(policy: BaselinePolicy, observations: PyTorchObs) -> th.Tensor:
    """Mean divergence of a policy from itself in (n_states, ...) observations: 0, with second-order gradients."""
    # PyTorch's fast attention has no second derivatives
    with sdpa_kernel(SDPBackend.MATH):
        with th.no_grad():
            old = copy(policy.evaluate_observations(observations)[0])
        return kl_divergence(old, policy.evaluate_observations(observations)[0]).mean()


@th.enable_grad()
def fisher_vector_product(divergence: th.Tensor, parameters: Sequence[th.Tensor]) -> Callable[[th.Tensor], th.Tensor]:
    """
    Products (n,) -> (n,) with the Fisher information matrix of a policy, for parameters with n entries in total.

    The matrix is the Hessian of the :func:`self_divergence` (Kakade, 2001), and a product is the gradient of the gradient's
    product with a vector (Pearlmutter, 1994, "Fast exact multiplication by the Hessian").
    """
    gradient = flatten(th.autograd.grad(divergence, parameters, create_graph=True, materialize_grads=True))

    def product(vector: th.Tensor) -> th.Tensor:
        return flatten(th.autograd.grad(gradient, parameters, vector, retain_graph=True, materialize_grads=True))

    return product


def natural_direction(
    gradient: th.Tensor, product: Callable[[th.Tensor], th.Tensor], damping: float, max_steps: int
) -> th.Tensor:
    """
    Direction of ``(F + damping I)^-1 gradient``, by conjugate gradients (Hestenes & Stiefel, 1952).

    :param gradient: (n,) finite, not all zero
    :param product: products with the Fisher matrix F
    :param damping: above 0, in the unit of F; large values approach the plain gradient
    :param max_steps: maximum number of steps of the solver
    """
    # Squares of numbers below 1e-22 underflow in float32
    unit = gradient / gradient.abs().max()
    unit = unit / unit.norm()
    # The solver's random start and its tolerance are absolute numbers
    scale = unit @ product(unit) + damping
    with torch_seeded_from(np.random.default_rng(0), gradient.device):
        return conjugate_gradient_solver(lambda vector: (product(vector) + damping * vector) / scale, unit, max_iter=max_steps)


def length_of_divergence(
    divergence_at: Callable[[float], float], target: float, first: float, tolerance: float = 1e-3, max_evaluations: int = 30
) -> tuple[float, float]:
    """
    Find the length of a step with a given divergence, which is almost quadratic in short lengths.

    :param divergence_at: divergence after a step of some length, infinite or NaN if it is not defined
    :param target: divergence to reach, above 0, up to a relative error of ``tolerance``
    :param first: first length to try, above 0. No step is longer than ten times this length
    :param max_evaluations: number of evaluations until the longest step known to stay below the target is taken
    :return: the length, which is evaluated last, and its divergence
    """
    low, high, length = 0.0, 10 * first, first
    for n in range(max_evaluations):
        divergence = divergence_at(length)
        if abs(divergence - target) <= tolerance * target:
            return length, divergence
        if divergence < target:
            low = length
        else:
            high = length
        factor = math.sqrt(target / divergence) if 0 < divergence < math.inf else math.inf
        # Bisect at times: the divergence may be far from quadratic
        is_inside = low < factor * length < high and (n < 4 or n % 2 == 1)
        length = factor * length if is_inside else (low + high) / 2
    return low, divergence_at(low)


def natural_step(
    parameters: Sequence[th.Tensor],
    product: Callable[[th.Tensor], th.Tensor],
    divergence: Callable[[], float],
    target_kl: float,
    damping: float,
    max_steps: int,
) -> float:
    """
    Take a step of ``target_kl`` along the natural gradient, in place.

    :param parameters: trained parameters, whose gradients are not all zero
    :param product: products with the Fisher matrix, see :func:`natural_direction`, as ``damping`` and ``max_steps``
    :param divergence: mean divergence of the current policy from the old one; a ValueError means that it is not defined
    :return: divergence of the step, 0 if only a step of length 0 leaves it finite
    """
    gradient = flatten(parameter.grad for parameter in parameters if parameter.grad is not None)
    direction = natural_direction(-gradient, product, damping, max_steps)
    squared_length = direction @ product(direction)
    start = flatten(parameters).detach()

    def divergence_at(length: float) -> float:
        assign(parameters, start + length * direction)
        try:
            return divergence()
        except ValueError:
            return math.inf

    # To second order, the divergence is half the squared length in the metric of the Fisher matrix
    first = math.sqrt(2 * target_kl / max(squared_length.item(), 1e-12))
    _, reached = length_of_divergence(divergence_at, target_kl, first)
    # torch.compile turns off the checks of PyTorch's distributions
    if not math.isfinite(reached):
        raise ValueError("No step along the gradient leaves the policy finite: scale down rewards or observations")
    return reached
