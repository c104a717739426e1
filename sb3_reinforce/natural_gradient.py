"""
The natural gradient (Amari, 1998; Kakade, 2001, "A natural policy gradient"; Peters & Schaal, 2008), which improves the policy
most per change of its action distributions, with a damping that the batch chooses. A Krylov space approximates it without the
Fisher matrix, and a divergence sets the length of a step (Duan et al., 2016, https://arxiv.org/abs/1604.06778).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.stateless import _reparametrize_module

from sb3_reinforce.policies import BaselinePolicy, flatten

#: Dampings that batches choose from, the first one where nothing is known
DAMPINGS = np.array([0.1, 0.01, 0.03, 0.3, 1.0, 3.0, 10.0])
_NEWEST = 0.1  # weight of the latest batch in the mean scores

Product = Callable[[th.Tensor], th.Tensor]


@th.no_grad()
def assign(parameters: Sequence[th.Tensor], vector: th.Tensor) -> None:
    """Set parameters to the entries of a vector, in place, because NumPy may share their memory."""
    for parameter, values in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(values.view_as(parameter))


@th.enable_grad()
def fisher_vector_product(policy: BaselinePolicy, observations: PyTorchObs, counts: th.Tensor) -> Product:
    """
    Products (n,) -> (n,) with the Fisher information matrix of a policy with n trained parameters, the mean over (n_states,
    ...) observations, each of which occurs (n_states,) ``counts`` times.

    The matrix is ``J^T H J`` (Martens, 2020, "New insights and perspectives on the natural gradient method", section 9): J is
    the Jacobian of the distributions' parameters, and H the Hessian of the divergence in these. A product with J is the
    gradient of ``J^T u`` in u, which is linear, so that one backward pass is recorded for all products.
    """
    # Aliases of the parameters have no hooks: experiment trackers expect the gradient of the loss there
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    aliases = {names[id(parameter)]: parameter.detach().requires_grad_() for parameter in policy.trained_parameters()}
    parameters = list(aliases.values())
    # PyTorch's fast attention has no second derivatives
    with sdpa_kernel(SDPBackend.MATH), _reparametrize_module(policy, aliases):
        distribution: Any = policy.evaluate_observations(observations)[0].distribution
        parts = distribution if isinstance(distribution, list) else [distribution]
        named = [{name: vars(part)[name] for name in part.arg_constraints if name in vars(part)} for part in parts]
        outputs = [tensor for tensors in named for tensor in tensors.values() if tensor.requires_grad]
        dual = [th.zeros_like(output, requires_grad=True) for output in outputs]
        transposed = flatten(th.autograd.grad(outputs, parameters, dual, create_graph=True, materialize_grads=True))

    point = [output.detach().requires_grad_() for output in outputs]
    values, divergence = iter(point), th.zeros(())
    for part, tensors in zip(parts, named, strict=True):
        old = type(part)(**{name: tensor.detach() for name, tensor in tensors.items()}, validate_args=False)
        given = {name: next(values) if tensor.requires_grad else tensor for name, tensor in tensors.items()}
        new = type(part)(**given, validate_args=False)
        of_states = th.distributions.kl_divergence(old, new).reshape(len(counts), -1)
        divergence = divergence + (counts[:, None] * of_states).sum() / counts.sum()
    slope = th.autograd.grad(divergence, point, create_graph=True, materialize_grads=True)

    def product(vector: th.Tensor) -> th.Tensor:
        image = th.autograd.grad(transposed, dual, vector, retain_graph=True, materialize_grads=True)
        image = th.autograd.grad(slope, point, image, retain_graph=True, materialize_grads=True)
        return flatten(th.autograd.grad(outputs, parameters, image, retain_graph=True, materialize_grads=True))

    return product


class KrylovSpace(NamedTuple):
    """
    Krylov space of the Fisher matrix F and a gradient: (k, n) orthonormal basis, which begins with the direction of the
    gradient, (k, k) tridiagonal matrix ``basis F basis^T``, and norm of the gradient.
    """

    basis: th.Tensor
    fisher: np.ndarray
    norm: float

    def solve(self, damping: np.ndarray) -> np.ndarray:
        """
        (n_dampings, k) coordinates of ``(F + damping I)^-1 gradient`` in the basis: those of k steps of conjugate gradients.
        One space serves all dampings, since a shift of the matrix does not change it (Frommer & Maass, 1999).
        """
        eigenvalues, eigenvectors = np.linalg.eigh(self.fisher)
        return (self.norm * eigenvectors[0] / (eigenvalues + damping[:, None])) @ eigenvectors.T

    def direction(self, damping: float) -> th.Tensor:
        """(n,) approximation of ``(F + damping I)^-1 gradient``."""
        return self.basis.T @ th.as_tensor(self.solve(np.array([damping]))[0]).to(self.basis)


def krylov_space(product: Product, gradient: th.Tensor, max_steps: int) -> KrylovSpace:
    """
    Build a Krylov space of at most ``max_steps`` dimensions with the Lanczos algorithm (Lanczos, 1950), reorthogonalized
    because of float32, for an (n,) gradient that is finite and not all zero.
    """
    # Squares of numbers below 1e-22 underflow in float32
    scale = gradient.abs().max()
    norm = (gradient / scale).norm()
    vectors, diagonal, off_diagonal = [gradient / scale / norm], [], []
    while True:
        image = product(vectors[-1])
        diagonal.append((vectors[-1] @ image).item())
        basis = th.stack(vectors)
        for _ in range(2):
            image = image - basis.T @ (basis @ image)
        length = image.norm().item()
        # What is left of the image may be rounding alone
        if len(vectors) == max_steps or not length > 1e-6 * abs(diagonal[0]):
            break
        off_diagonal.append(length)
        vectors.append(image / length)
    fisher = np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)
    return KrylovSpace(basis, fisher, (scale * norm).item())


def cross_validate(halves: Sequence[th.Tensor], spaces: Sequence[KrylovSpace], dampings: np.ndarray) -> np.ndarray:
    """
    Judge dampings: each half of a batch proposes directions, and the other half judges them. A short step of divergence ``e``
    along a direction ``d`` improves the objective by ``sqrt(2 e) g.d / sqrt(d.F d)``. With the gradient ``g`` of the other
    half, which does not share the noise of ``d``, the estimate is unbiased; with that of the half itself, it is too large.

    :param halves: two (n,) gradients from different episodes
    :param spaces: their Krylov spaces
    :return: (2, n_dampings) judged and promised improvements per ``sqrt(2 e)``, summed over the halves
    """
    scores = np.zeros((2, len(dampings)))
    for space, gradients in zip(spaces, (halves[::-1], halves), strict=True):
        steps = space.solve(dampings)
        lengths = np.sqrt(np.einsum("di,ij,dj->d", steps, space.fisher, steps).clip(1e-30))
        scores += np.stack([steps @ (space.basis @ gradient).double().cpu().numpy() for gradient in gradients]) / lengths
    return scores


def natural_direction(
    product: Product, parts: Sequence[th.Tensor], dampings: np.ndarray, scores: np.ndarray, max_steps: int
) -> tuple[th.Tensor, int, np.ndarray]:
    """
    Compute the direction of ``(F + damping I)^-1 gradient``, with the damping of the best mean score.

    :param parts: (n,) gradients of one or two parts of a batch, which add up to its gradient; not all are zero
    :param dampings: dampings to choose from, the first one where scores are equal
    :param scores: (2, n_dampings) running means of :func:`cross_validate`, to which two parts contribute
    :return: (n,) direction, position of the damping, and running means
    """
    parts = [part for part in parts if part.any()]
    spaces = [krylov_space(product, part, max_steps) for part in parts]
    if len(parts) == 2:
        scores = (1 - _NEWEST) * scores + _NEWEST * cross_validate(parts, spaces, dampings)
    chosen = int(scores[0].argmax())
    # The inverse is linear: the directions of the parts add up to that of the batch
    return th.stack([space.direction(dampings[chosen]) for space in spaces]).sum(dim=0), chosen, scores


def divergence_of_signal(signal: float, n_updates: int) -> float:
    """
    Divergence of a step along a direction of which the share ``signal`` is not noise: it falls with the number of updates
    (Robbins & Monro, 1951, "A stochastic approximation method"), unless a quarter or more is signal.
    """
    return 0.0125 * min(1.0, max(4 * signal, 1 / (1 + n_updates / 40)))


def length_of_divergence(divergence_at: Callable[[float], float], target: float, first: float) -> None:
    """
    Find the length of a step with a given divergence (to 0.1%), which is almost quadratic in short lengths. It is evaluated
    last; after 30 evaluations, the longest step known to stay below the target is taken.

    :param divergence_at: divergence after a step of some length, infinite or NaN if it is not defined
    :param first: first length to try, above 0. No step is longer than ten times this length
    """
    low, high, length = 0.0, 10 * first, first
    for n in range(30):
        divergence = divergence_at(length)
        if abs(divergence - target) <= 1e-3 * target:
            return
        low, high = (length, high) if divergence < target else (low, length)
        length *= math.sqrt(target / divergence) if 0 < divergence < math.inf else math.inf
        # Bisect at times: the divergence may be far from quadratic
        if not low < length < high or (n >= 4 and n % 2 == 0):
            length = (low + high) / 2
    divergence_at(low)


def natural_step(
    parameters: Sequence[th.Tensor], direction: th.Tensor, product: Product, divergence: Callable[[], float], target_kl: float
) -> None:
    """Take a step of ``target_kl`` against an (n,) direction, in place. A ValueError of ``divergence`` means infinity."""
    direction, start = direction / direction.abs().max().clamp(min=1e-30), flatten(parameters).detach()

    def divergence_at(length: float) -> float:
        assign(parameters, start - length * direction)
        try:
            return divergence()
        except ValueError:
            return math.inf

    # To second order, the divergence is half the squared length in the metric of the Fisher matrix
    first = math.sqrt(2 * target_kl / max((direction @ product(direction)).item(), 1e-12))
    length_of_divergence(divergence_at, target_kl, first)
