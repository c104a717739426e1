"""Groups of runs to compare: runs with the same environment and settings."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sb3_reinforce.tools.report.estimates import estimate, interval, iqm
from sb3_reinforce.tools.report.runs import Run


@dataclass
class Group:
    """Runs with the same environment and settings."""

    #: Letter of the group in the report
    label: str
    env_id: str
    #: Settings that differ between the groups of this environment
    settings: str
    runs: Sequence[Run]

    @property
    def returns(self) -> np.ndarray:
        """(n_runs,) mean final returns, without runs that have none."""
        return np.array([run.final_returns.mean() for run in self.runs if run.final_returns is not None])

    @property
    def estimate(self) -> str:
        """IQM of the returns and its interval."""
        returns = self.returns
        return estimate(iqm(returns), interval(returns, iqm)) if len(returns) else "unknown"


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """
    Group runs by environment and settings.

    :param runs: runs to compare
    :return: groups, in the order of their environments
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
            by_settings.setdefault(text or "same settings", []).append(run)
        groups += [Group(next(labels), env_id, text, found) for text, found in by_settings.items()]
    return groups
