"""Groups of runs to compare: runs with the same algorithm, environment and settings."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sb3_reinforce.tools.report.estimates import count, estimate, interval, iqm
from sb3_reinforce.tools.report.runs import Run


@dataclass
class Group:
    """Runs with the same algorithm, environment and settings."""

    #: Algorithm, with a number if there are several groups with this algorithm and environment
    label: str
    env_id: str
    #: Settings that differ between the groups with this algorithm and environment
    settings: str
    #: Runs to average
    runs: Sequence[Run]
    unfinished: Sequence[Run]
    #: Whether returns are those of evaluations, or else of training episodes
    is_evaluated: bool

    @property
    def title(self) -> str:
        """Label and number of random seeds."""
        seeds = {run.name if run.seed == "unknown" else run.seed for run in self.runs}
        return f"{self.label}, {count(seeds, 'seed') if seeds else 'unfinished'}"

    @property
    def returns(self) -> np.ndarray:
        """(n_runs,) mean final returns, without runs that have none."""
        finals = [self.final_returns(run) for run in self.runs]
        return np.array([final.mean() for final in finals if final is not None])

    @property
    def estimate(self) -> str:
        """IQM of the returns and its interval."""
        returns = self.returns
        return estimate(iqm(returns), interval(returns, iqm)) if len(returns) else "unknown"

    def final_returns(self, run: Run) -> np.ndarray | None:
        """
        Return the last returns of a run.

        :param run: run of this group
        :return: returns of the last evaluation, or of the last 100 training episodes; None without any
        """
        if self.is_evaluated or run.episodes is None:
            return run.final_returns if self.is_evaluated else None
        return run.episodes["r"].to_numpy()[-100:]

    def curve(self, run: Run) -> dict[str, np.ndarray] | None:
        """
        Return the learning curve of a run.

        :param run: run of this group
        :return: arrays "steps", "seconds" and "mean" of evaluations, or of the last 100 training episodes; None without any
        """
        if self.is_evaluated or run.episodes is None:
            return run.evaluations if self.is_evaluated else None
        episodes = run.episodes.assign(mean=run.episodes["r"].rolling(100, min_periods=1).mean())
        shown = np.unique(np.linspace(0, len(episodes) - 1, 200).astype(int))
        return {name: episodes[name].to_numpy()[shown] for name in ("steps", "seconds", "mean")}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """
    Group runs by environment, algorithm and settings.

    A run is unfinished if it has fewer steps than were asked for. If their number is unknown, it is unfinished if it has less
    than 90% of the steps of the longest run of its group.

    :param runs: runs to compare
    :return: groups, in the order of their environments and algorithms
    """
    groups: list[Group] = []
    for env_id in dict.fromkeys(run.env_id for run in runs):
        of_env = [run for run in runs if run.env_id == env_id]
        ended = [run for run in of_env if run.is_finished is not False]
        is_evaluated = all(run.final_returns is not None for run in ended) or any(run.episodes is None for run in ended)
        for algorithm in dict.fromkeys(run.algorithm for run in of_env):
            by_settings = _by_settings([run for run in of_env if run.algorithm == algorithm])
            for number, (text, found) in enumerate(by_settings.items(), start=1):
                label = f"{algorithm} ({number})" if len(by_settings) > 1 else algorithm
                groups.append(Group(label, env_id, text, *_split(found), is_evaluated))
    return groups


def _by_settings(runs: Sequence[Run]) -> dict[str, list[Run]]:
    known = [run.settings for run in runs if run.settings]
    names = [name for name in dict.fromkeys(itertools.chain(*known)) if len({each.get(name) for each in known}) > 1]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        text = (
            ", ".join(f"{name}={run.settings.get(name, 'unknown')}" for name in names) if run.settings else "unknown settings"
        )
        groups.setdefault(text or "same settings", []).append(run)
    return groups


def _split(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Split into finished and unfinished runs."""
    enough = 0.9 * max(run.steps or 0 for run in runs)
    is_finished = [(run.steps or 0) >= enough if run.is_finished is None else run.is_finished for run in runs]
    return list(itertools.compress(runs, is_finished)), [run for run, done in zip(runs, is_finished, strict=True) if not done]
