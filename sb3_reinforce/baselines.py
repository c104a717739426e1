"""
Critics that are linear in fixed features and fitted in closed form: of state values (the baseline), and of action values.

A critic is two modules: a feature map without trained weights, and :class:`LinearBaseline` on top of it. Nothing here is a
``Parameter``: everything is a buffer, so that it is saved with the policy and out of the optimizer's reach.
"""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim, preprocess_obs
from torch import nn

#: Most features that a fit works with: random projections stand for more. It takes time in proportion to the cube of this
#: number, and memory to its square.
MAX_FEATURES = 384

#: Squared singular values of the standardized features below this fraction of the largest count as zero: float32 features
#: cannot tell them apart from collinear ones.
_RANK_TOLERANCE = 1e-12

#: A feature whose standard deviation is below this fraction of its mean is constant up to rounding.
_CONSTANT_TOLERANCE = 1e-10

#: Samples that are worked on at once: few enough to stay in the processor's cache.
_BLOCK = 2048

#: Features of states and actions are made in blocks of about so many numbers.
_NUMBERS = 2_000_000


class Moments(NamedTuple):
    """Number (or summed weight), mean (n,) and scatter matrix about the mean (n, n) of samples of n numbers."""

    n_samples: float
    mean: np.ndarray
    scatter: np.ndarray


class RandomProjection(nn.Module):
    """
    Fixed random projections of many features: every feature goes, with a random sign, into the sum of one of the outputs
    (count sketch: Charikar et al., 2002; Weinberger et al., 2009, "Feature hashing for large scale multitask learning").

    Scalar products are kept in the mean, as by a dense random matrix, in time and memory proportional to the features alone.

    :param in_features: number of features n
    :param out_features: number of projections, (batch, n) features become (batch, out_features)
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


class QuadraticFeatures(nn.Module):
    """
    The features and their squares: the baseline of rllab (Duan et al., 2016) without its powers of time.

    :param in_features: number of features n, (batch, n) features become (batch, 2 n)
    """

    def __init__(self, in_features: int):
        super().__init__()
        self.out_features = 2 * in_features

    def forward(self, features: th.Tensor) -> th.Tensor:
        return th.cat([features, features**2], dim=-1)


class RandomFeatures(nn.Module):
    """
    The features beside fixed random tanh units of them, so that a linear fit is a non-linear function of the state
    (random feature regression: Rahimi & Recht, 2007; with a hidden layer, Huang et al., 2006).

    The weights are standard normal and the biases uniform in [-pi, pi], drawn once from PyTorch's generator: an input of
    unit scale, as ``normalize_observations`` makes it, reaches both the linear and the saturated part of the units.

    :param in_features: number of features n, (batch, n) features become (batch, n + n_units)
    :param n_units: number of random units; more explain more of the returns and cost a larger linear system
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


class NoBaseline(nn.Module):
    """In the place of a :class:`LinearBaseline`: expects a return of 0 everywhere, and learns nothing."""

    def project(self, features: th.Tensor) -> th.Tensor:
        return features.new_empty(len(features), 0)

    def predict(self, features: th.Tensor) -> th.Tensor:
        return features.new_zeros(len(features), 1, dtype=th.float64)

    forward = predict

    def fit(self, features: np.ndarray, returns: np.ndarray) -> None:
        pass


def solve_standardized(gram: np.ndarray, moment: np.ndarray, ridge: float) -> np.ndarray:
    """
    Minimum-norm solution w of ``(gram + ridge I) w = moment``, ignoring directions in which the gram matrix has no extent.

    :param gram: (n, n) symmetric, positive semi-definite
    :param moment: (n,)
    :param ridge: at least 0, in the unit of gram
    :return: (n,)
    """
    if ridge >= 1e-6:
        # Regular: a third of the time
        return np.linalg.solve(gram + ridge * np.eye(len(gram)), moment)
    eigenvalues, eigenvectors = np.linalg.eigh(gram)
    kept = eigenvalues > _RANK_TOLERANCE * max(eigenvalues[-1], 0.0)
    basis = eigenvectors[:, kept]
    return basis @ (basis.T @ moment / (eigenvalues[kept] + ridge))


class LinearBaseline(nn.Module):
    """
    Least-squares regression of returns on features, ``v(s) = w . features(s) + b``; zero until the first fit.

    The fit minimizes the mean squared error plus ``ridge`` times the squared norm of the weights, both in units of each
    feature's standard deviation, with a free intercept. Constant features get no weight, and among equally good solutions
    (collinear features, or more features than samples) the one with the smallest norm is taken. It equals scikit-learn's
    ``LinearRegression``, or ``Ridge(alpha=ridge * n_samples)`` behind a ``StandardScaler``.

    :param in_features: number of features n; of more than ``MAX_FEATURES``, random projections are used
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
            # Sufficient statistics of [features, return] over the batches remembered; of the symmetric scatter matrix, the
            # upper triangle row by row
            n_joint = n_features + 1
            self.register_buffer("count", th.zeros((), dtype=th.float64))
            self.register_buffer("mean", th.zeros(n_joint, dtype=th.float64))
            self.register_buffer("scatter", th.zeros(n_joint * (n_joint + 1) // 2, dtype=th.float64))

    def forward(self, features: th.Tensor) -> th.Tensor:
        """Predict the returns of (batch, n) features, see :meth:`predict`."""
        return self.predict(self.project(features))

    def predict(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: (batch, n_features) as :attr:`project` returns them: the features, or random projections of them
        :return: (batch, 1) predicted returns, float64
        """
        values = nn.functional.linear(features.double(), self.weight, self.bias)
        return values.clamp(self.low, self.high) if self.truncate else values

    def fit(self, features: np.ndarray, returns: np.ndarray) -> None:
        """
        Replace the weights by the fit to a batch (and the batches remembered).

        :param features: (n_samples, n_features) as :attr:`project` returns them, finite
        :param returns: (n_samples,) finite
        :raises ValueError: without a sample, or when something is not finite; the weights then stay as they were
        """
        features, returns = np.asarray(features), np.asarray(returns, dtype=np.float64)
        n_features = self.n_features
        if features.shape != (len(returns), n_features) or len(returns) == 0:
            raise ValueError(
                f"The baseline needs at least one sample of {n_features} features and a return each, "
                f"got features of shape {features.shape} and returns of shape {returns.shape}"
            )
        # Products that overflow are as bad as features that are not finite
        with np.errstate(over="ignore", invalid="ignore"):
            moments = _moments(features, returns)
        # A single sample that is not finite makes its mean, and the scatter of its feature, not finite either
        if not (np.isfinite(moments.mean).all() and np.isfinite(moments.scatter).all()):
            raise ValueError("The baseline cannot be fitted to features or returns that are NaN, infinite or near overflow")
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
        upper = np.triu_indices(len(moments.mean))
        scatter = np.zeros_like(moments.scatter)
        scatter[upper] = self.memory * self.scatter.cpu().numpy()
        scatter.T[upper] = scatter[upper]
        merged = _merge(Moments(self.memory * self.count.item(), self.mean.cpu().numpy(), scatter), moments)
        self.count.fill_(merged.n_samples)
        self.mean.copy_(th.as_tensor(merged.mean))
        self.scatter.copy_(th.as_tensor(merged.scatter[upper]))
        return merged


class ActionFeatures(nn.Module):
    """
    Features of states and actions: both, and all their products, so that what an action is worth may depend on the state.

    Discrete actions are one-hot vectors, several of them side by side. Continuous ones are clipped to the bounds of the action
    space, as they are for the environment, scaled to [-1, 1], and have their squares beside them; where a bound is infinite,
    they are not scaled.

    :param in_features: number of state features n
    :param action_space: action space, of m discrete actions or dimensions
    :param squashed: whether the policy keeps continuous actions in [-1, 1] itself
    """

    low: th.Tensor
    high: th.Tensor

    def __init__(self, in_features: int, action_space: spaces.Space, squashed: bool = False):
        super().__init__()
        self.action_space = action_space
        if isinstance(action_space, spaces.Box):
            shape = (get_action_dim(action_space),)
            bounds = (np.full(shape, -1.0), np.full(shape, 1.0)) if squashed else (action_space.low, action_space.high)
            for name, bound in zip(("low", "high"), bounds, strict=True):
                self.register_buffer(name, th.as_tensor(bound.astype(np.float64).flatten()))
            n_numbers = 2 * shape[0]
        else:
            n_numbers = spaces.flatdim(action_space)
        # SB3's number of features may be one of NumPy's
        self.out_features = int((1 + in_features) * (1 + n_numbers) - 1)

    def encode(self, actions: th.Tensor) -> th.Tensor:
        """:return: (batch, n_numbers) float32, for (batch, action_dim) actions as the policy samples them"""
        if not isinstance(self.action_space, spaces.Box):
            numbers = preprocess_obs(actions.long().reshape(-1, *self.action_space.shape), self.action_space)  # type: ignore[misc]
            assert isinstance(numbers, th.Tensor)
            return numbers
        scale = (self.high - self.low) / 2
        is_scaled = th.isfinite(scale) & (scale > 0)
        center = th.where(is_scaled, (self.high + self.low) / 2, 0.0)
        clipped = th.minimum(th.maximum(actions.double(), self.low), self.high)
        scaled = (clipped - center) / th.where(is_scaled, scale, 1.0)
        return th.cat([scaled, scaled**2], dim=-1).float()

    def forward(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """:return: (batch, out_features) for (batch, n) state features and (batch, action_dim) actions"""
        numbers = self.encode(actions)
        products = features[:, :, None] * numbers[:, None, :]
        return th.cat([features, numbers, products.flatten(start_dim=1)], dim=-1)


class ActionValues(nn.Module):
    """
    Least-squares regression of returns on features of states and actions, ``q(s, a)``; zero until the first fit.

    :param in_features: number of state features n
    :param action_space: action space
    :param squashed: see :class:`ActionFeatures`
    :param kwargs: of :class:`LinearBaseline`
    """

    def __init__(self, in_features: int, action_space: spaces.Space, squashed: bool = False, **kwargs: Any):
        super().__init__()
        self.features = ActionFeatures(in_features, action_space, squashed)
        self.linear = LinearBaseline(self.features.out_features, **kwargs)

    def project(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """:return: (batch, n_joint) what the values are linear in, see :meth:`ActionFeatures.forward`"""
        # In blocks: before random projections, there may be many products
        size = max(1, _NUMBERS // self.features.out_features)
        blocks = zip(features.split(size), actions.split(size), strict=True)
        return th.cat([self.linear.project(self.features(*block)) for block in blocks])

    def predict(self, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """:return: (batch, 1) predicted returns, float64"""
        return self.linear.predict(self.project(features, actions))

    def fit(self, features: th.Tensor, actions: th.Tensor, returns: np.ndarray) -> None:
        """Replace the weights by the fit to a batch, see :meth:`LinearBaseline.fit`."""
        self.linear.fit(self.project(features, actions).cpu().numpy(), returns)


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


def _fit_moments(moments: Moments, ridge: float) -> tuple[np.ndarray, float]:
    """Weights and intercept from the moments of the joint samples: one solve of an (n, n) system."""
    n_samples, mean, scatter = moments
    std = np.sqrt(np.diag(scatter)[:-1] / n_samples)
    # Dividing by infinity silences features that are constant
    std = np.where(std > _CONSTANT_TOLERANCE * np.abs(mean[:-1]), std, np.inf)
    correlation = scatter[:-1, :-1] / n_samples / np.outer(std, std)
    weight = solve_standardized(correlation, scatter[:-1, -1] / n_samples / std, ridge) / std
    return weight, mean[-1] - weight @ mean[:-1]


#: ``baseline=`` -> feature map on n features (None for the features themselves), and ridge unless ``baseline_kwargs`` has
#: another. That of the richer maps only has to keep their nearly collinear features from fitting noise.
FEATURE_MAPS: dict[str, tuple[type[QuadraticFeatures] | type[RandomFeatures] | None, float]] = {
    "linear": (None, 0.0),
    "quadratic": (QuadraticFeatures, 1e-5),
    "random_features": (RandomFeatures, 0.2),
}
