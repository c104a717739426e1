"""
Critics that are linear in fixed features and fitted in closed form: the baseline of state values, and action values.

All tensors are buffers, so they are saved with the policy and the optimizer does not change them.
"""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim, preprocess_obs
from torch import nn

#: Maximum number of features of a fit, which takes cubic time: more features are projected at random.
MAX_FEATURES = 384
#: Eigenvalues below this fraction of the largest one are 0: float32 features cannot be told from collinear ones.
_RANK_TOLERANCE = 1e-12
#: A feature is constant up to rounding if its standard deviation is below this fraction of its mean.
_CONSTANT_TOLERANCE = 1e-10
#: Samples per block of the moments, which stays in the processor's cache, and numbers per block of action features
_BLOCK, _NUMBERS = 2048, 2_000_000


class Moments(NamedTuple):
    """Number (or summed weight) of samples of n numbers, their mean (n,), and their scatter matrix about the mean (n, n)."""

    n_samples: float
    mean: np.ndarray
    scatter: np.ndarray


class RandomProjection(nn.Module):
    """
    Random projection by a count sketch: each feature is added, with a random sign, to one of the outputs (Charikar et al.,
    2002; Weinberger et al., 2009, https://arxiv.org/abs/0902.2206). Scalar products are kept in expectation.
    """

    index: th.Tensor
    sign: th.Tensor

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.out_features = out_features
        self.register_buffer("index", th.randint(out_features, (in_features,), dtype=th.int32))
        self.register_buffer("sign", 2 * th.randint(2, (in_features,), dtype=th.int8) - 1)

    def forward(self, features: th.Tensor) -> th.Tensor:
        projections = features.new_zeros(len(features), self.out_features)
        return projections.index_add_(1, self.index, features * self.sign)


class RandomFeatures(nn.Module):
    """
    Append fixed random tanh units, so that a linear fit is a nonlinear function of the state (Rahimi & Recht, 2007, "Random
    features for large-scale kernel machines"). Weights are standard normal and biases uniform in [-pi, pi]: inputs of unit
    scale reach the linear and the saturated part of the units. More units explain more of the returns.
    """

    weight: th.Tensor
    bias: th.Tensor

    def __init__(self, in_features: int, n_units: int = 128):
        super().__init__()
        self.out_features = in_features + n_units
        self.register_buffer("weight", th.randn(n_units, in_features))
        self.register_buffer("bias", np.pi * (2 * th.rand(n_units) - 1))

    def forward(self, features: th.Tensor) -> th.Tensor:
        return th.cat([features, th.tanh(nn.functional.linear(features, self.weight, self.bias))], dim=-1)


#: ``baseline=`` -> feature map (None for the features themselves) and default ridge
FEATURE_MAPS: dict[str, tuple[type[RandomFeatures] | None, float]] = {
    "linear": (None, 0.0),
    "random_features": (RandomFeatures, 0.2),
}


class NoBaseline(nn.Module):
    """A baseline that is 0 everywhere."""

    def project(self, features: th.Tensor) -> th.Tensor:
        return features.new_empty(len(features), 0)

    def forward(self, features: th.Tensor) -> th.Tensor:
        return features.new_zeros(len(features), 1, dtype=th.float64)

    predict = forward

    def fit(self, features: np.ndarray, returns: np.ndarray) -> None: ...


class LinearBaseline(nn.Module):
    """
    Least-squares regression of returns on features, ``v(s) = w . features(s) + b``, which is 0 until the first fit.

    The fit minimizes the mean squared error plus ``ridge`` times the squared norm of the weights, in units of each feature's
    standard deviation, with a free intercept. Of several solutions (constant or collinear features, or more features than
    samples), the one of minimum norm is taken. It equals scikit-learn's ``LinearRegression``, or ``Ridge(alpha=ridge *
    n_samples)`` behind a ``StandardScaler``.

    :param in_features: number of features; more than ``MAX_FEATURES`` are projected at random
    :param ridge: at least 0, dimensionless; 0 is ordinary least squares
    :param memory: in [0, 1), weight of earlier batches relative to the next one
    :param truncate: whether predictions are clipped to the range of the latest returns (Györfi et al., 2002, "A
        distribution-free theory of nonparametric regression"), for learned features, which may vary more in the next batch
    """

    weight: th.Tensor
    bias: th.Tensor
    count: th.Tensor
    mean: th.Tensor
    scatter: th.Tensor
    low: th.Tensor
    high: th.Tensor

    def __init__(self, in_features: int, ridge: float = 0.0, memory: float = 0.0, truncate: bool = False):
        super().__init__()
        self.project = RandomProjection(in_features, MAX_FEATURES) if in_features > MAX_FEATURES else nn.Identity()
        self.n_features = n_features = min(in_features, MAX_FEATURES)
        self.ridge = ridge
        self.memory = memory
        self.truncate = truncate
        self.register_buffer("weight", th.zeros(1, n_features, dtype=th.float64))
        self.register_buffer("bias", th.zeros(1, dtype=th.float64))
        if truncate:
            self.register_buffer("low", th.zeros((), dtype=th.float64))
            self.register_buffer("high", th.zeros((), dtype=th.float64))
        if memory > 0:
            # Moments of [features, return] over the remembered batches; of the scatter matrix, the upper triangle
            self.register_buffer("count", th.zeros((), dtype=th.float64))
            self.register_buffer("mean", th.zeros(n_features + 1, dtype=th.float64))
            self.register_buffer("scatter", th.zeros((n_features + 1) * (n_features + 2) // 2, dtype=th.float64))

    def forward(self, features: th.Tensor) -> th.Tensor:
        """Predict the returns of (batch, in_features) features."""
        return self.predict(self.project(features))

    def predict(self, features: th.Tensor) -> th.Tensor:
        """Predict (batch, 1) returns, float64, from the (batch, n_features) output of :attr:`project`."""
        values = nn.functional.linear(features.double(), self.weight, self.bias)
        return values.clamp(self.low, self.high) if self.truncate else values

    def fit(self, features: np.ndarray, returns: np.ndarray) -> None:
        """
        Fit the weights to a batch and the remembered ones.

        :param features: (n_samples, n_features) output of :attr:`project`
        :param returns: (n_samples,) discounted returns
        :raises ValueError: if there is no sample, or a value is not finite
        """
        features, returns = np.asarray(features), np.asarray(returns, dtype=np.float64)
        if features.shape != (len(returns), self.n_features) or len(returns) == 0:
            raise ValueError(
                f"The baseline needs samples of {self.n_features} features and a return each, got features of shape "
                f"{features.shape} and returns of shape {returns.shape}"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            moments = _moments(features, returns)
        # One sample that is not finite makes the moments not finite
        if not (np.isfinite(moments.mean).all() and np.isfinite(moments.scatter).all()):
            raise ValueError("The baseline cannot be fitted to features or returns that are NaN, infinite or near overflow")
        weight, bias = _fit_moments(self._remember(moments), self.ridge)
        self.weight.copy_(th.as_tensor(weight)[None])
        self.bias.fill_(bias)
        if self.truncate:
            self.low.fill_(returns.min())
            self.high.fill_(returns.max())

    def _remember(self, moments: Moments) -> Moments:
        """Merge the moments of a batch into the remembered ones."""
        if self.memory == 0:
            return moments
        upper = np.triu_indices(len(moments.mean))
        scatter = np.zeros_like(moments.scatter)
        scatter[upper] = self.memory * self.scatter.cpu().numpy()
        scatter.T[upper] = scatter[upper]
        merged = _merge(Moments(self.memory * self.count.item(), self.mean.cpu().numpy(), scatter), moments)
        for buffer, value in zip((self.count, self.mean, self.scatter), (*merged[:2], merged.scatter[upper]), strict=True):
            buffer.copy_(th.as_tensor(value, dtype=th.float64))
        return merged


class ActionValues(nn.Module):
    """
    Least-squares regression of returns on features of states and actions, ``q(s, a)``, which is 0 until the first fit.

    Its features are those of the state and of the action, and all their products. Discrete actions are one-hot vectors.
    Continuous actions are clipped to the bounds of the action space ([-1, 1] if the policy squashes them) and scaled to
    [-1, 1] (not if a bound is infinite), and their squares are appended. ``kwargs`` go to :class:`LinearBaseline`.
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(self, in_features: int, action_space: spaces.Space, squashed: bool = False, **kwargs: Any):
        super().__init__()
        self.action_space = action_space
        if isinstance(action_space, spaces.Box):
            shape = (get_action_dim(action_space),)
            bounds = (np.full(shape, -1.0), np.full(shape, 1.0)) if squashed else (action_space.low, action_space.high)
            for name, bound in zip(("low", "high"), bounds, strict=True):
                self.register_buffer(name, th.as_tensor(bound.astype(np.float64).flatten()))
        n_numbers = 2 * shape[0] if isinstance(action_space, spaces.Box) else spaces.flatdim(action_space)
        # SB3's number of features may be a NumPy integer
        self.n_joint = int((1 + in_features) * (1 + n_numbers) - 1)
        self.linear = LinearBaseline(self.n_joint, **kwargs)

    def encode(self, actions: th.Tensor) -> th.Tensor:
        """Encode (batch, action_dim) sampled actions as (batch, n_numbers) float32."""
        if not isinstance(self.action_space, spaces.Box):
            actions = actions.long().reshape(-1, *self.action_space.shape)  # type: ignore[misc]
            return preprocess_obs(actions, self.action_space)  # type: ignore[return-value]
        scale = (self.high - self.low) / 2
        is_scaled = th.isfinite(scale) & (scale > 0)
        center = th.where(is_scaled, (self.high + self.low) / 2, 0.0)
        clipped = th.minimum(th.maximum(actions.double(), self.low), self.high)
        scaled = (clipped - center) / th.where(is_scaled, scale, 1.0)
        return th.cat([scaled, scaled**2], dim=-1).float()

    def project(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """Compute the (batch, n_features) input of the regression from state features and actions, in blocks."""
        size, projected = max(1, _NUMBERS // self.n_joint), []
        for block, numbers in zip(features.split(size), self.encode(actions).split(size), strict=True):
            products = block[:, :, None] * numbers[:, None, :]
            projected.append(self.linear.project(th.cat([block, numbers, products.flatten(start_dim=1)], dim=-1)))
        return th.cat(projected)

    def predict(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return self.linear.predict(self.project(features, actions))

    def fit(self, features: th.Tensor, actions: th.Tensor, returns: np.ndarray) -> None:
        """Fit the weights, see :meth:`LinearBaseline.fit`."""
        self.linear.fit(self.project(features, actions).cpu().numpy(), returns)


def solve_standardized(gram: np.ndarray, moment: np.ndarray, ridge: float) -> np.ndarray:
    """Minimum-norm solution of ``(gram + ridge I) w = moment``, which ignores directions without variance."""
    if ridge >= 1e-6:
        return np.linalg.solve(gram + ridge * np.eye(len(gram)), moment)
    eigenvalues, eigenvectors = np.linalg.eigh(gram)
    kept = eigenvalues > _RANK_TOLERANCE * max(eigenvalues[-1], 0.0)
    basis = eigenvectors[:, kept]
    return basis @ (basis.T @ moment / (eigenvalues[kept] + ridge))


def _moments(features: np.ndarray, returns: np.ndarray) -> Moments:
    """Moments of the joint samples [features, return]."""
    n = features.shape[1] + 1
    moments = Moments(0.0, np.zeros(n), np.zeros((n, n)))
    for start in range(0, len(returns), _BLOCK):
        block = slice(start, start + _BLOCK)
        joint = np.column_stack([features[block], returns[block]])
        mean = joint.mean(axis=0)
        joint -= mean
        moments = _merge(moments, Moments(float(len(joint)), mean, joint.T @ joint))
    return moments


def _merge(first: Moments, second: Moments) -> Moments:
    """Moments of two sets of samples together (Chan et al., 1979, "Updating formulae ... for computing sample variances")."""
    n_samples = first.n_samples + second.n_samples
    shift = second.mean - first.mean
    mean = first.mean + (second.n_samples / n_samples) * shift
    scatter = first.scatter + second.scatter
    scatter += np.outer((first.n_samples * second.n_samples / n_samples) * shift, shift)
    return Moments(n_samples, mean, scatter)


def _fit_moments(moments: Moments, ridge: float) -> tuple[np.ndarray, float]:
    """Weights and intercept of the fit to the joint samples."""
    n_samples, mean, scatter = moments
    std = np.sqrt(np.diag(scatter)[:-1] / n_samples)
    # Dividing by infinity removes constant features
    std = np.where(std > _CONSTANT_TOLERANCE * np.abs(mean[:-1]), std, np.inf)
    correlation = scatter[:-1, :-1] / n_samples / np.outer(std, std)
    weight = solve_standardized(correlation, scatter[:-1, -1] / n_samples / std, ridge) / std
    return weight, mean[-1] - weight @ mean[:-1]
