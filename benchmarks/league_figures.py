"""
Make the table and the figure of the league in docs/benchmarks.md from the results of `benchmarks.league`.

    python -m benchmarks.league_figures

Scores are IQMs over seeds with bootstrap intervals. A normalized score is 0 at the lowest and 1 at the highest IQM of the four
algorithms on a task. The figure is a performance profile: the share of runs whose normalized score is above each value, all
tasks together, with pointwise stratified bootstrap intervals (Agarwal et al., 2021, https://arxiv.org/abs/2108.13264).
"""

from typing import Any

import numpy as np

from benchmarks.common import IMAGES, PAGE, fill, read_folder
from benchmarks.figures import markdown
from benchmarks.league import ALGORITHMS, FOLDER, TASKS
from sb3_reinforce.tools.report.estimates import interval, iqm

COLORS = dict(zip(ALGORITHMS, ("tab:blue", "tab:brown", "tab:orange", "tab:red"), strict=True))


def read(env_id: str) -> dict[str, list[dict[str, Any]]]:
    """Read the runs of a task, on the seeds that all algorithms have."""
    runs = {algo: read_folder(FOLDER / env_id / algo) for algo in ALGORITHMS}
    common = set.intersection(*({run["seed"] for run in found} for found in runs.values()))
    return {algo: [run for run in found if run["seed"] in common] for algo, found in runs.items()}


def returns(runs: list[dict[str, Any]]) -> np.ndarray:
    """(n_seeds,) mean final returns."""
    return np.array([np.mean(run["final_returns"]) for run in runs])


def normalize(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Normalize the scores of runs by the lowest and the highest IQM on their task, to 1 if these are equal."""
    iqms = [iqm(values) for values in scores.values()]
    low, high = min(iqms), max(iqms)
    return {algo: (values - low) / (high - low) if high > low else np.ones_like(values) for algo, values in scores.items()}


def table(scores: dict[str, dict[str, np.ndarray]], seconds: dict[str, dict[str, float]]) -> str:
    """Create a table with one row per task, and the mean normalized score."""
    rows: list[tuple[Any, ...]] = []
    for env_id, found in scores.items():
        best = max(iqm(values) for values in found.values())
        cells = []
        for algo, values in found.items():
            bold = "**" if iqm(values) == best else ""
            digits = 2 if abs(best) < 10 else 0
            # "z": no negative zeros
            middle, low, high, worst = (
                f"{value:z.{digits}f}" for value in (iqm(values), *interval(values, iqm), values.min())
            )
            span = "" if len(values) < 2 else f" [{low}, {high}], worst {worst}"
            cells.append(f"{bold}{middle}{bold}{span}; {seconds[env_id][algo]:.0f} s")
        rows.append((env_id, f"{TASKS[env_id] / 1e6:g} M", len(values), *cells))
    means = [np.mean([iqm(normalize(found)[algo]) for found in scores.values()]) for algo in ALGORITHMS]
    # Several may be first, but not all
    iqms = [{algo: iqm(values) for algo, values in found.items()} for found in scores.values()]
    firsts = [sum(found[algo] == max(found.values()) > min(found.values()) for found in iqms) for algo in ALGORITHMS]
    both = zip(means, firsts, strict=True)
    rows.append(("mean normalized score", "", "", *(f"{mean:.2f}, first on {n_first}" for mean, n_first in both)))
    return markdown(["task", "steps", "seeds", *(name.upper() for name in ALGORITHMS)], rows)


def profile(scores: dict[str, dict[str, np.ndarray]]) -> None:
    """Plot the performance profiles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    thresholds = np.linspace(0, 1.1, 111)
    rng = np.random.default_rng(0)
    for algo, color in COLORS.items():
        tasks = [normalize(found)[algo] for found in scores.values()]
        draws = [np.concatenate([rng.choice(values, len(values)) for values in tasks]) for _ in range(2000)]
        shares = (np.array(draws)[:, :, None] > thresholds).mean(axis=1)
        axes.plot(thresholds, (np.concatenate(tasks)[:, None] > thresholds).mean(axis=0), color=color, label=algo.upper())
        axes.fill_between(thresholds, *np.percentile(shares, [2.5, 97.5], axis=0), color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="normalized score", ylabel="share of runs above it", ylim=(0, 1), xlim=(0, 1.1))
    axes.legend()
    figure.savefig(IMAGES / "league.png", dpi=100)


def read_all() -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, float]]]:
    """Read the returns, and the median processor seconds of a run, by task and algorithm."""
    found = {env_id: runs for env_id in TASKS if all((runs := read(env_id)).values())}
    scores = {env_id: {algo: returns(runs[algo]) for algo in ALGORITHMS} for env_id, runs in found.items()}
    seconds = {
        env_id: {algo: float(np.median([run["cpu_seconds"] for run in runs[algo]])) for algo in ALGORITHMS}
        for env_id, runs in found.items()
    }
    return scores, seconds


def main() -> None:
    scores, seconds = read_all()
    fill(PAGE, "league", table(scores, seconds))
    profile(scores)


if __name__ == "__main__":
    main()
