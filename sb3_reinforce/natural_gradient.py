"""
The natural gradient, and how far to go along it.

In this direction, the distributions of actions improve most for how much they change, whatever the parameters that make them
(Amari, 1998; Kakade, 2001, "A natural policy gradient"; Peters & Schaal, 2008). Conjugate gradients find it without the Fisher
matrix itself, and a divergence sets the length of the step, as in truncated natural policy gradients (Duan et al., 2016,
https://arxiv.org/abs/1604.06778; Rajeswaran et al., 2017, https://arxiv.org/abs/1703.02660).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch as th
from sb3_contrib.common.utils import conjugate_gradient_solver

from sb3_reinforce.episodes.acting import torch_seeded_from


@dataclass(frozen=True)
class InverseTimeDecay:
    """
    A schedule that counts updates: ``start / (1 + n_updates / halving)``.

    With noisy gradients, steps have to become shorter for a policy to settle, and slowly, so that it gets anywhere (Robbins &
    Monro, 1951, "A stochastic approximation method"). Unlike a schedule of the progress remaining, this one does not depend on
    when training is to end.

    :param start: value at the first update, above 0
    :param halving: number of updates after which it is half of that, above 0
    :raises ValueError: if either is not above 0
    """

    start: float
    halving: float

    def __post_init__(self) -> None:
        if not (0 < self.start < math.inf and 0 < self.halving):
            raise ValueError(f"start and halving must be above 0, got {self}")

    def __call__(self, n_updates: int) -> float:
        return self.start / (1 + n_updates / self.halving)


def flatten(tensors: Iterable[th.Tensor]) -> th.Tensor:
    """The numbers of all tensors in one vector."""
    return th.cat([tensor.flatten() for tensor in tensors])


def assign(parameters: Sequence[th.Tensor], vector: th.Tensor) -> None:
    """Set parameters to the numbers of a vector, in place: they may share their memory."""
    with th.no_grad():
        for parameter, values in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(values.view_as(parameter))


# Ctrl-C at an unlucky moment leaves PyTorch without gradients
@th.enable_grad()
def fisher_vector_product(divergence: th.Tensor, parameters: Sequence[th.Tensor]) -> Callable[[th.Tensor], th.Tensor]:
    """
    The Fisher information matrix of a policy, as a function that multiplies vectors by it.

    It is the Hessian of the divergence of the policy from itself (Kakade, 2001), whose products with vectors are gradients of
    its gradient (Pearlmutter, 1994, "Fast exact multiplication by the Hessian").

    :param divergence: scalar, mean over states of KL(policy || policy), the first of which is detached
    :param parameters: what the policy depends on, and perhaps others; n numbers in all
    :return: (n,) -> (n,)
    """
    gradients = th.autograd.grad(divergence, parameters, create_graph=True, materialize_grads=True)
    gradient = flatten(gradients)

    def product(vector: th.Tensor) -> th.Tensor:
        return flatten(th.autograd.grad(gradient, parameters, vector, retain_graph=True, materialize_grads=True))

    return product


def natural_direction(
    gradient: th.Tensor, product: Callable[[th.Tensor], th.Tensor], damping: float, max_steps: int
) -> th.Tensor:
    """
    Direction of ``(F + damping I)^-1 gradient``, by conjugate gradients (Hestenes & Stiefel, 1952).

    :param gradient: (n,) finite, not all zero
    :param product: multiplies a vector by the Fisher matrix F, see :func:`fisher_vector_product`
    :param damping: above 0, in the unit of F. Much is the plain gradient, little the natural one
    :param max_steps: of the solver, at least 1
    :return: (n,) of arbitrary length
    """
    # The squares of numbers below 1e-22 are 0 in float32
    unit = gradient / gradient.abs().max()
    unit = unit / unit.norm()
    # Scaled, since the solver's random start and its tolerance are absolute numbers
    scale = unit @ product(unit) + damping
    with torch_seeded_from(np.random.default_rng(0), gradient.device):
        return conjugate_gradient_solver(lambda vector: (product(vector) + damping * vector) / scale, unit, max_iter=max_steps)


def length_of_divergence(
    divergence_at: Callable[[float], float], target: float, first: float, tolerance: float = 1e-3, max_evaluations: int = 30
) -> tuple[float, float]:
    """
    How long a step has to be for a divergence, which is close to quadratic in short lengths.

    :param divergence_at: divergence after a step of some length, infinite or NaN where it is too long to be evaluated
    :param target: the divergence asked for, above 0
    :param first: length to try first, above 0. No step is longer than ten times this
    :param tolerance: relative error of the divergence
    :param max_evaluations: after so many, the longest step known to stay below the target has to do
    :return: the length, which is the last one evaluated, and its divergence
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
        # Where the divergence is not that close to quadratic, the interval has to shrink for sure
        is_inside = low < factor * length < high and (n < 4 or n % 2 == 1)
        length = factor * length if is_inside else (low + high) / 2
    return low, divergence_at(low)


def natural_step(
    parameters: Sequence[th.Tensor],
    self_divergence: th.Tensor,
    divergence: Callable[[], float],
    target_kl: float,
    damping: float,
    max_steps: int,
) -> float:
    """
    Take a step of a given divergence along the natural gradient, in place.

    :param parameters: trained parameters, with the gradient of the loss, which is not all zero
    :param self_divergence: scalar, see :func:`fisher_vector_product`
    :param divergence: returns the mean divergence of the policy, as its parameters are, from that before the step; raises a
        ValueError where it is not defined
    :param target_kl: the divergence asked for, above 0
    :param damping: see :func:`natural_direction`, as ``max_steps``
    :return: the divergence reached
    :raises ValueError: if no length of the step leaves the divergence finite
    """
    gradient = flatten(parameter.grad for parameter in parameters if parameter.grad is not None)
    product = fisher_vector_product(self_divergence, parameters)
    direction = natural_direction(-gradient, product, damping, max_steps)
    curvature = direction @ product(direction)
    start = flatten(parameters).detach()

    def divergence_at(length: float) -> float:
        assign(parameters, start + length * direction)
        try:
            return divergence()
        except ValueError:
            # The distributions are not defined any more
            return math.inf

    # To the second order, the divergence is half the squared length times the curvature
    _, reached = length_of_divergence(divergence_at, target_kl, math.sqrt(2 * target_kl / max(curvature.item(), 1e-12)))
    # PyTorch does not always check its distributions: after torch.compile, no process does
    if not math.isfinite(reached):
        raise ValueError("No step along the gradient leaves the policy finite")
    return reached
