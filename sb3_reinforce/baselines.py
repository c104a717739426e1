"""
Critics that are linear in fixed features and fitted in closed form: the baseline of state values, and action values.

All tensors are buffers, so they are saved with the policy and the optimizer does not change them.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim, preprocess_obs
from torch import nn

from sb3_reinforce.episodes.normalization import CHUNK

#: Maximum number of features of a fit, which takes cubic time: more features are projected at random.
MAX_FEATURES = 384
_RANK_TOLERANCE = 1e-12  # of eigenvalues, relative to the largest one: float32 features cannot be told from collinear ones
_CONSTANT_TOLERANCE = 1e-10  # of the standard deviation of a feature, relative to its mean


class Moments(NamedTuple):
    """Number (or summed weight) of samples of n numbers, their mean (n,), and their scatter matrix about the mean (n, n)."""

    n_samples: float
    mean: np.ndarray
    scatter: np.ndarray


class BaselineFeatures(nn.Module):
    """
    Features of a state-value baseline: those of the state, the time, and fixed random tanh units of both.

    From the time, the baseline knows how much of an episode is left (Duan et al., 2016; Pardo et al., 2018). Random units make
    a linear fit a nonlinear function (Rahimi & Recht, 2007, "Random features for large-scale kernel machines"). Their weights
    are standard normal and their biases uniform in [-pi, pi], so that inputs of unit scale reach the linear and the saturated
    part. The unit of time is ``1 / (1 - gamma)`` steps, at most 1000, the horizon of the returns.
    """

    weight: th.Tensor
    bias: th.Tensor
    time_unit: th.Tensor

    def __init__(self, in_features: int, n_units: int = 0, time: bool = False, gamma: float = 0.99):
        super().__init__()
        # Saved with the fit, which is in this unit even if load() replaces gamma
        self.register_buffer("time_unit", th.tensor(1 / max(1 - gamma, 1e-3) if time else 0.0))
        n_inputs = int(in_features) + time  # SB3's number of features may be a NumPy integer
        self.out_features = n_inputs + n_units
        self.register_buffer("weight", th.randn(n_units, n_inputs))
        self.register_buffer("bias", np.pi * (2 * th.rand(n_units) - 1))

    def forward(self, features: th.Tensor, n_steps: th.Tensor | None = None) -> th.Tensor:
        """Compute the features of (batch, in_features) states, (batch,) ``n_steps`` after the start of the episode."""
        if self.time_unit > 0:
            time = features.new_zeros(len(features)) if n_steps is None else n_steps.to(features) / self.time_unit
            features = th.cat([features, time.clamp(max=10.0)[:, None]], dim=-1)
        if len(self.bias) == 0:
            return features
        return th.cat([features, th.tanh(nn.functional.linear(features, self.weight, self.bias))], dim=-1)


#: ``baseline=`` -> default number of random units, whether the time is a feature, and default ridge
BASELINES: dict[str, tuple[int, bool, float]] = {"linear": (0, False, 0.0), "random_features": (128, True, 0.2)}


class LinearBaseline(nn.Module):
    """
    Least-squares regression of returns on features, ``v(s) = w . features(s) + b``, which is 0 until the first fit.

    The fit minimizes the mean squared error plus ``ridge`` times the squared norm of the weights, in units of each feature's
    standard deviation, with a free intercept. Of several solutions, the one of minimum norm is taken. It equals scikit-learn's
    ``LinearRegression``, or ``Ridge(alpha=ridge * n_samples)`` behind a ``StandardScaler``.

    :param features: number of features, or the :class:`BaselineFeatures` of a state. More than ``MAX_FEATURES`` are projected
        at random
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
    projection: th.Tensor

    def __init__(self, features: int | BaselineFeatures, ridge: float = 0.0, memory: float = 0.0, truncate: bool = False):
        super().__init__()
        self.features = BaselineFeatures(features) if isinstance(features, int) else features
        in_features = self.features.out_features
        self.n_features = n_features = min(in_features, MAX_FEATURES)
        if in_features > MAX_FEATURES:
            # Scalar products are kept in expectation (Johnson & Lindenstrauss, 1984)
            self.register_buffer("projection", th.randn(in_features, MAX_FEATURES) / math.sqrt(MAX_FEATURES))
        self.ridge, self.memory, self.truncate = ridge, memory, truncate
        # Moments of [features, return] over the remembered batches; of the scatter matrix, the upper triangle
        moments = dict(count=(), mean=(n_features + 1,), scatter=((n_features + 1) * (n_features + 2) // 2,))
        for name, shape in (dict(weight=(1, n_features), bias=(1,), low=(), high=()) | moments).items():
            self.register_buffer(name, th.zeros(shape, dtype=th.float64))

    def forward(self, features: th.Tensor, n_steps: th.Tensor | None = None) -> th.Tensor:
        """Predict the returns of states, see :class:`BaselineFeatures`."""
        return self.predict(self.project(features, n_steps))

    def project(self, features: th.Tensor, n_steps: th.Tensor | None = None) -> th.Tensor:
        """Compute the (batch, n_features) input of the regression."""
        features = self.features(features, n_steps)
        return features @ self.projection if self.n_features < self.features.out_features else features

    def predict(self, features: th.Tensor) -> th.Tensor:
        """Predict (batch, 1) returns, float64, from the (batch, n_features) output of :attr:`project`."""
        values = nn.functional.linear(features.double(), self.weight, self.bias)
        return values.clamp(self.low, self.high) if self.truncate else values

    def fit(self, features: np.ndarray, returns: np.ndarray) -> None:
        """
        Fit the weights to (n_samples, n_features) output of :meth:`project` and (n_samples,) returns, and to earlier batches.

        :raises ValueError: if there is no sample, or a value is not finite
        """
        features, returns = np.asarray(features), np.asarray(returns, dtype=np.float64)
        if features.shape != (len(returns), self.n_features) or len(returns) == 0:
            shapes = f"features of shape {features.shape} and returns of shape {returns.shape}"
            raise ValueError(f"The baseline needs samples of {self.n_features} features and a return each, got {shapes}")
        with np.errstate(over="ignore", invalid="ignore"):
            moments = _moments(features, returns)
        # One sample that is not finite makes the moments not finite
        if not (np.isfinite(moments.mean).all() and np.isfinite(moments.scatter).all()):
            raise ValueError("The baseline cannot be fitted to features or returns that are NaN, infinite or near overflow")
        weight, bias = _fit_moments(self._remember(moments), self.ridge)
        fitted = (weight, bias, returns.min(), returns.max())
        for buffer, value in zip((self.weight, self.bias, self.low, self.high), fitted, strict=True):
            buffer.copy_(th.as_tensor(value))

    def _remember(self, moments: Moments) -> Moments:
        """Merge the moments of a batch into the remembered ones."""
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
    Continuous ones are clipped to their bounds, and their squares are appended. ``kwargs`` go to :class:`LinearBaseline`.
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
        self.n_joint = int((1 + in_features) * (1 + n_numbers) - 1)
        self.linear = LinearBaseline(self.n_joint, **kwargs)

    def encode(self, actions: th.Tensor) -> th.Tensor:
        """Encode (batch, action_dim) sampled actions as (batch, n_numbers) float32."""
        if not isinstance(self.action_space, spaces.Box):
            actions = actions.long().reshape(-1, *self.action_space.shape)  # type: ignore[misc]
            return preprocess_obs(actions, self.action_space)  # type: ignore[return-value]
        clipped = th.minimum(th.maximum(actions.double(), self.low), self.high)
        return th.cat([clipped, clipped**2], dim=-1).float()

    def project(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """Compute the (batch, n_features) input of the regression from state features and actions, in blocks."""
        size, projected = max(1, CHUNK // self.n_joint), []
        for block, numbers in zip(features.split(size), self.encode(actions).split(size), strict=True):
            products = block[:, :, None] * numbers[:, None, :]
            projected.append(self.linear.project(th.cat([block, numbers, products.flatten(start_dim=1)], dim=-1)))
        return th.cat(projected)

    def predict(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """Predict (batch, 1) returns."""
        return self.linear.predict(self.project(features, actions))

    def fit(self, features: th.Tensor, actions: th.Tensor, returns: np.ndarray) -> None:
        """Fit the weights, see :meth:`LinearBaseline.fit`."""
        self.linear.fit(self.project(features, actions).cpu().numpy(), returns)


def _moments(features: np.ndarray, returns: np.ndarray) -> Moments:
    """Moments of the joint samples [features, return]."""
    joint = np.column_stack([features, returns])
    mean = joint.mean(axis=0)
    joint -= mean
    return Moments(float(len(joint)), mean, joint.T @ joint)


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


def solve_standardized(gram: np.ndarray, moment: np.ndarray, ridge: float) -> np.ndarray:
    """Minimum-norm solution of ``(gram + ridge I) w = moment``, which ignores directions without variance."""
    if ridge >= 1e-6:
        return np.linalg.solve(gram + ridge * np.eye(len(gram)), moment)
    return np.linalg.pinv(gram, rcond=_RANK_TOLERANCE, hermitian=True) @ moment
