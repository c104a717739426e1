"""
Generate the figures and tables of docs/where.md from the results of `benchmarks.where`. Also run by `benchmarks.figures`.

    python -m benchmarks.where_figures
"""

from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import where
from benchmarks.common import IMAGES, WHERE, fill, read_folder
from sb3_reinforce.tools.report.drawing import draw_evaluations
from sb3_reinforce.tools.report.estimates import estimate, interval, iqm, number

#: Color of each algorithm in the learning curves
COLORS = {
    "reinforce": "tab:blue",
    "reinforce-cut": "tab:cyan",
    "a2c": "tab:green",
    "ppo": "tab:orange",
    "ppo-long": "tab:red",
}
#: Minimum number of seeds for a verdict. All runs of one of two equal algorithms return more than all runs of the other in 10%
#: of cases with three seeds each, and in 3% with four
MIN_SEEDS = 4


def probability_of_improvement(ours: np.ndarray, theirs: np.ndarray, axis: int = -1) -> Any:
    """
    Probability that a run of one algorithm returns more than a run of another, where ties count half (Agarwal et al., 2021,
    section 4.3: Mann-Whitney U statistic, divided by the number of pairs).

    :param ours: (..., n) final returns of one algorithm
    :param theirs: (..., m) final returns of the other algorithm
    :param axis: required by SciPy, always the last axis
    :return: (...) probabilities
    """
    difference = np.expand_dims(ours, -1) - np.expand_dims(theirs, -2)
    return np.mean((1 + np.sign(difference)) / 2, axis=(-2, -1))


def improvement(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Return the probability of improvement and its 95% percentile bootstrap interval, resampling both groups."""
    value = float(probability_of_improvement(ours, theirs))
    if min(len(ours), len(theirs)) < 2:
        return value, np.nan, np.nan
    if value in (0, 1):
        # All resamples have the same value
        return value, value, value
    options = dict(method="percentile", n_resamples=2000, vectorized=True, rng=np.random.default_rng(0))
    return value, *stats.bootstrap((ours, theirs), probability_of_improvement, **options).confidence_interval


def better(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Format the probability of improvement."""
    value, low, high = improvement(ours, theirs)
    return f"{value:.2f}" if np.isnan(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def runs_of(task: str) -> dict[str, list[dict[str, Any]]]:
    """Read the runs of each algorithm with results."""
    runs = {name: read_folder(where.FOLDER / task / name) for name in where.TASKS[task].algorithms}
    return {name: found for name, found in runs.items() if found}


def is_complete(task: str) -> bool:
    """Whether all algorithms have the same seeds, at least two."""
    found = runs_of(task)
    seeds = {tuple(run["seed"] for run in runs) for runs in found.values()}
    return len(found) == len(where.TASKS[task].algorithms) and len(seeds) == 1 and len(seeds.pop()) > 1


def finals(runs: list[dict[str, Any]]) -> np.ndarray:
    return np.array([np.mean(run["final_returns"]) for run in runs])


def draw(task: str, path: Path) -> None:
    """Plot the evaluations of each run, and their IQM with its interval, against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4), constrained_layout=True)
    for name, runs in runs_of(task).items():
        curves = [
            dict(
                steps=[point["steps"] for point in run["evaluations"]] + [run["timesteps"]],
                mean=[point["mean_return"] for point in run["evaluations"]] + [np.mean(run["final_returns"])],
            )
            for run in runs
        ]
        draw_evaluations(axes, curves, COLORS[name], f"{name}, {len(runs)} seeds")
    axes.set(xlabel="steps", ylabel="return of the deterministic policy", title=task)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def improvements_of(task: str) -> dict[str, tuple[float, float, float]]:
    """Compute the improvement of REINFORCE over each other algorithm with results."""
    (_, ours), *others = runs_of(task).items()
    return {name: improvement(finals(ours), finals(runs)) for name, runs in others}


def verdict(task: str) -> str:
    """Summarize over which algorithms REINFORCE improves, according to the intervals."""
    if (n_seeds := len(runs_of(task)["reinforce"])) < MIN_SEEDS:
        return f"{n_seeds} seeds are too few for a comparison."
    groups: dict[str, list[str]] = {"returns more than": [], "returns less than": [], "is not distinguishable from": []}
    for name, (_, low, high) in improvements_of(task).items():
        if low > 0.5:
            groups["returns more than"].append(name)
        elif high < 0.5:
            groups["returns less than"].append(name)
        else:
            groups["is not distinguishable from"].append(name)
    said = [f"{what} {', '.join(names)}" for what, names in groups.items() if names]
    return f"After {where.TASKS[task].timesteps:,} steps, reinforce {'; '.join(said)}."


def table(task: str) -> str:
    """Create a table with one row per algorithm."""
    lines = [
        "| algorithm | settings | seeds | return: IQM [95% interval] | worst, best | sampled | REINFORCE is better | CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ours = finals(runs_of(task)["reinforce"])
    for name, runs in runs_of(task).items():
        returns = finals(runs)
        sampled = np.array([run["training_return"] for run in runs])
        settings = "defaults" if runs[0]["settings"] == "defaults" else f"`{runs[0]['settings']}`"
        lines.append(
            f"| {name} | {settings} | {len(runs)} | {estimate(iqm(returns), interval(returns, iqm))} "
            f"| {number(returns.min())}, {number(returns.max())} | {number(iqm(sampled))} "
            f"| {'' if name == 'reinforce' else better(ours, returns)} | {np.median([run['seconds'] for run in runs]):.0f} |"
        )
    return "\n".join(lines)


def block(task: str) -> str:
    """Generate the section of a task: verdict, figure and table."""
    if not is_complete(task):
        return f"Not measured yet: `python -m benchmarks.where --tasks {task}`."
    return f"{verdict(task)}\n\n![{task}: return against steps](images/where_{task}.png)\n\n{table(task)}"


def main() -> None:
    for task in where.TASKS:
        if is_complete(task):
            draw(task, IMAGES / f"where_{task}.png")
        fill(WHERE, f"where-{task}", block(task))


if __name__ == "__main__":
    main()
