"""
State-value baselines that are linear in fixed features and fitted in closed form.

A baseline is two modules: a feature map without trained weights, and :class:`LinearBaseline` on top of it, whose weights
are the least-squares solution for the returns of the latest batch (or of a fading memory of batches). Nothing here is a
``Parameter``: everything is a buffer, so that it is saved with the policy and out of the optimiser's reach.
"""

from typing import NamedTuple

import numpy as np
import torch as th
from torch import nn

#: Squared singular values of the standardised features below this share of the largest count as zero. The normal equations
#: square the condition number, so that this treats as collinear what float32 features cannot tell apart from it.
_RANK_TOLERANCE = 1e-12

#: A feature whose standard deviation is below this share of its mean is a constant up to rounding.
_CONSTANT_TOLERANCE = 1e-10


#: Samples that are worked on at once: few enough to stay in the processor's cache.
_BLOCK = 2048


class Moments(NamedTuple):
    """Number (or summed weight), mean (n,) and scatter matrix about the mean (n, n) of samples of n numbers."""

    n_samples: float
    mean: np.ndarray
    scatter: np.ndarray


class QuadraticFeatures(nn.Module):
    """
    The features and their squares: the baseline of rllab (Duan et al., 2016) without its powers of time.

    :param features_dim: number of features n; the map returns 2 n
    """

    def __init__(self, features_dim: int):
        super().__init__()
        self.out_features = 2 * features_dim

    def forward(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: (batch, n)
        :return: (batch, 2 n)
        """
        return th.cat([features, features**2], dim=-1)


class RandomFeatures(nn.Module):
    """
    The features beside fixed random tanh units of them, so that a linear fit is a non-linear function of the state
    (random feature regression: Rahimi & Recht, 2007; with a hidden layer, Huang et al., 2006).

    The weights are standard normal and the biases uniform in [-pi, pi], drawn once from PyTorch's generator: an input of
    unit scale, as ``normalize_observations`` makes it, reaches both the linear and the saturated part of the units.

    :param features_dim: number of features n; the map returns n + n_random
    :param n_random: number of random units; more explain more of the returns and cost a larger linear system
    """

    weight: th.Tensor
    bias: th.Tensor

    def __init__(self, features_dim: int, n_random: int = 128):
        super().__init__()
        self.out_features = features_dim + n_random
        self.register_buffer("weight", th.randn(n_random, features_dim))
        self.register_buffer("bias", np.pi * (2 * th.rand(n_random) - 1))

    def forward(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: (batch, n)
        :return: (batch, n + n_random)
        """
        return th.cat([features, th.tanh(nn.functional.linear(features, self.weight, self.bias))], dim=-1)


def solve_standardised(gram: np.ndarray, moment: np.ndarray, ridge: float) -> np.ndarray:
    """
    Minimum-norm solution w of ``(gram + ridge I) w = moment``, ignoring directions in which the gram matrix has no extent.

    :param gram: (n, n) symmetric, positive semi-definite
    :param moment: (n,) or (n, k)
    :param ridge: at least 0, in the unit of gram
    :return: same shape as moment
    """
    eigenvalues, eigenvectors = np.linalg.eigh(gram)
    kept = eigenvalues > _RANK_TOLERANCE * max(eigenvalues[-1], 0.0)
    basis = eigenvectors[:, kept]
    return basis @ ((basis.T @ moment).T / (eigenvalues[kept] + ridge)).T


class LinearBaseline(nn.Module):
    """
    Least-squares regression of returns on features, ``v(s) = w . features(s) + b``; zero until the first fit.

    The fit minimises the mean squared error plus ``ridge`` times the squared norm of the weights, both in units of each
    feature's standard deviation, with a free intercept: it depends neither on the units of the features nor on the size of
    the batch. Constant features get no weight, and among equally good solutions (collinear features, or more features than
    samples) the one with the smallest norm is taken. It equals scikit-learn's ``LinearRegression``, or
    ``Ridge(alpha=ridge * n_samples)`` behind a ``StandardScaler``.

    :param in_features: number of features n
    :param ridge: at least 0, dimensionless; 0 is ordinary least squares. Raise it when the features are many and noisy
    :param memory: in [0, 1), weight of the batches before the latest one, per batch; 0 forgets them. Raise it when one batch
        holds too few episodes to fit all features
    :param truncate: whether predictions are kept within the returns of the latest batch (the truncated least squares of
        Györfi et al., 2002, "A distribution-free theory of nonparametric regression"). For features that are learned: one
        that hardly varies in one batch may do so in the next
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
        self.in_features = in_features
        self.ridge = ridge
        self.memory = memory
        self.truncate = truncate
        self.register_buffer("weight", th.zeros(1, in_features, dtype=th.float64))
        self.register_buffer("bias", th.zeros(1, dtype=th.float64))
        if truncate:
            self.register_buffer("low", th.zeros((), dtype=th.float64))
            self.register_buffer("high", th.zeros((), dtype=th.float64))
        if memory > 0:
            # Sufficient statistics of [features, return] over the batches remembered
            self.register_buffer("count", th.zeros((), dtype=th.float64))
            self.register_buffer("mean", th.zeros(in_features + 1, dtype=th.float64))
            self.register_buffer("scatter", th.zeros(in_features + 1, in_features + 1, dtype=th.float64))

    def forward(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: (batch, n)
        :return: (batch, 1) predicted returns, float64
        """
        values = nn.functional.linear(features.double(), self.weight, self.bias)
        return values.clamp(self.low, self.high) if self.truncate else values

    def fit(self, features: np.ndarray, returns: np.ndarray) -> None:
        """
        Replace the weights by the fit to a batch (and the batches remembered).

        :param features: (n_samples, n) finite
        :param returns: (n_samples,) finite
        :raises ValueError: without a sample, or when something is not finite; the weights then stay as they were
        """
        features, returns = np.asarray(features), np.asarray(returns, dtype=np.float64)
        if features.shape != (len(returns), self.in_features) or len(returns) == 0:
            raise ValueError(
                f"The baseline needs at least one sample of {self.in_features} features and a return each, "
                f"got features of shape {features.shape} and returns of shape {returns.shape}"
            )
        # Products that overflow are as bad as features that are not finite
        with np.errstate(over="ignore", invalid="ignore"):
            wide = self.memory == 0 and self.in_features > len(returns)
            moments = None if wide else _moments(features, returns)
            finite = np.isfinite(features).all() and np.isfinite(returns).all() if moments is None else _are_finite(moments)
        if not finite:
            raise ValueError("The baseline cannot be fitted to features or returns that are NaN, infinite or near overflow")
        if moments is None:
            weight, bias = _fit_wide(features.astype(np.float64), returns, self.ridge)
        else:
            weight, bias = _fit_moments(self._remember(moments), self.ridge)
        self.weight.copy_(th.as_tensor(weight)[None])
        self.bias.fill_(bias)
        if self.truncate:
            self.low.fill_(returns.min())
            self.high.fill_(returns.max())

    def _remember(self, moments: Moments) -> Moments:
        """Merge the moments of a batch into the fading memory, if there is one."""
        if self.memory == 0:
            return moments
        old = Moments(self.count.item(), self.mean.cpu().numpy(), self.scatter.cpu().numpy())
        merged = _merge(Moments(self.memory * old.n_samples, old.mean, self.memory * old.scatter), moments)
        self.count.fill_(merged.n_samples)
        self.mean.copy_(th.as_tensor(merged.mean))
        self.scatter.copy_(th.as_tensor(merged.scatter))
        return merged


def _moments(features: np.ndarray, returns: np.ndarray) -> Moments:
    """Moments of the joint samples [features, return], in blocks that fit in the processor's cache."""
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


def _are_finite(moments: Moments) -> bool:
    """Whether all samples were: a single one that is not makes its mean, and the scatter of its feature, not finite either."""
    return bool(np.isfinite(moments.mean).all() and np.isfinite(moments.scatter).all())


def _standard_deviations(variances: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Square root of the variances, infinite for features that are constant, so that dividing by it silences them."""
    std = np.sqrt(variances)
    return np.where(std > _CONSTANT_TOLERANCE * np.abs(means), std, np.inf)


def _fit_moments(moments: Moments, ridge: float) -> tuple[np.ndarray, float]:
    """Weights and intercept from the moments of the joint samples: one solve of an (n, n) system."""
    n_samples, mean, scatter = moments
    std = _standard_deviations(np.diag(scatter)[:-1] / n_samples, mean[:-1])
    correlation = scatter[:-1, :-1] / n_samples / np.outer(std, std)
    weight = solve_standardised(correlation, scatter[:-1, -1] / n_samples / std, ridge) / std
    return weight, mean[-1] - weight @ mean[:-1]


def _fit_wide(features: np.ndarray, returns: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """The same from the samples themselves, for more features than samples: one solve of an (n_samples, n_samples) system."""
    mean = features.mean(axis=0)
    std = _standard_deviations(features.var(axis=0), mean)
    standardised = (features - mean) / std
    kernel = standardised @ standardised.T / len(returns)
    centred = returns - returns.mean()
    weight = standardised.T @ solve_standardised(kernel, centred / len(returns), ridge) / std
    return weight, returns.mean() - weight @ mean


#: ``baseline=`` -> (feature map on n features or None for the features themselves, ridge). The ridge of the richer maps only
#: has to keep their nearly collinear features from fitting noise.
FEATURE_MAPS: dict[str, tuple[type[QuadraticFeatures] | type[RandomFeatures] | None, float]] = {
    "linear": (None, 0.0),
    "quadratic": (QuadraticFeatures, 1e-5),
    "random": (RandomFeatures, 1e-3),
}
