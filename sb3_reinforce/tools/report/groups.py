"""Runs that are compared: those of one environment with different settings."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sb3_reinforce.tools.report.estimates import estimate, interval, iqm
from sb3_reinforce.tools.report.runs import Run


@dataclass
class Group:
    """Runs with the same environment and settings."""

    #: A, B, C, ...
    label: str
    env_id: str
    #: Those in which groups of this environment differ
    settings: str
    runs: Sequence[Run]

    @property
    def returns(self) -> np.ndarray:
        """(n_runs,) the mean final return of each run that has one."""
        return np.array([run.final_returns.mean() for run in self.runs if run.final_returns is not None])

    @property
    def estimate(self) -> str:
        """IQM of the returns, and its interval."""
        returns = self.returns
        return estimate(iqm(returns), interval(returns, iqm)) if len(returns) else "unknown"


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """
    :param runs: to compare
    :return: them by environment and settings
    """
    groups: list[Group] = []
    labels = map(chr, itertools.count(ord("A")))
    for env_id in dict.fromkeys(run.env_id for run in runs):
        of_env = [run for run in runs if run.env_id == env_id]
        names = list(dict.fromkeys(name for run in of_env for name in run.settings))
        names = [name for name in names if len({run.settings.get(name) for run in of_env}) > 1]
        by_settings: dict[str, list[Run]] = {}
        for run in of_env:
            text = ", ".join(f"{name}={run.settings.get(name, 'unknown')}" for name in names)
            by_settings.setdefault(text or "one setting", []).append(run)
        groups += [Group(next(labels), env_id, text, members) for text, members in by_settings.items()]
    return groups
