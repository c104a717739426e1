"""Statistics of runs, and their formatting."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats


def iqm(values: np.ndarray, axis: int = -1) -> Any:
    """
    Interquartile mean: the mean of the middle half (Agarwal et al., 2021, https://arxiv.org/abs/2108.13264).

    :param values: array of any shape
    :param axis: axis to average over
    :return: array without this axis, or a number
    """
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(values: np.ndarray, statistic: Callable[..., Any]) -> tuple[Any, Any]:
    """
    95% percentile bootstrap interval of a statistic, with a fixed seed.

    :param values: (..., n) values, resampled along the last axis
    :param statistic: function of an array and ``axis``
    :return: (...) lower and upper bounds; NaN for fewer than two values
    """
    if values.shape[-1] < 2:
        return np.full(values.shape[:-1], np.nan), np.full(values.shape[:-1], np.nan)
    options = dict(axis=-1, method="percentile", n_resamples=2000, batch=100, vectorized=True)
    result = stats.bootstrap((values,), statistic, rng=np.random.default_rng(0), **options)
    return result.confidence_interval.low, result.confidence_interval.high


def number(value: float) -> str:
    """
    Format a number.

    :param value: number to format
    :return: four significant digits, or all digits before the decimal point
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def count(things: Any, name: str) -> str:
    """
    Format a count.

    :param things: object with a length
    :param name: name in the singular
    :return: length and name, for example "3 runs"
    """
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"


def estimate(value: float, bounds: tuple[float, float]) -> str:
    """
    Format an estimate.

    :param value: estimated value
    :param bounds: bounds of its interval, NaN if there is none
    :return: value and interval, for example "3 [2, 4]"
    """
    return number(value) if np.isnan(bounds[0]) else f"{number(value)} [{number(bounds[0])}, {number(bounds[1])}]"
