"""
The learning curves, the tables of final returns and the README's headline, from what `benchmarks.learning` has written.

    python -m benchmarks.figures

The interquartile mean (IQM) is the mean of the middle half of the runs' returns, and its interval is the 95 % percentile
bootstrap over runs (Agarwal et al., 2021, "Deep reinforcement learning at the edge of the statistical precipice"; for a single
environment their stratified bootstrap is the ordinary one).
"""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
from scipy import stats

from benchmarks.common import ADVANTAGES, IMAGES, README, fill
from benchmarks.learning import FOLDER
from sb3_reinforce.returns import AdvantageName

LANDER = "LunarLanderContinuous-v3"
SOLVED = 200.0
#: What the curves show, in which color
COLORS = {"reinforce": "tab:blue", "defaults": "tab:cyan", "race-trpo": "tab:red", "race-ppo": "tab:orange"}
#: The folders of the four advantage functions begin with this
ADVANTAGE = "advantage-"
ADVANTAGE_COLORS = dict(zip(get_args(AdvantageName), ("tab:blue", "tab:red", "tab:green", "tab:orange"), strict=True))


def read(env_id: str, name: str) -> list[dict[str, Any]]:
    """The runs of one environment and algorithm, by seed."""
    runs = [json.loads(path.read_text()) for path in (FOLDER / env_id / name).glob("seed_*.json")]
    return sorted(runs, key=lambda run: run["seed"])


def iqm(values: np.ndarray, axis: int = -1) -> Any:
    """Interquartile mean."""
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the IQM."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.min()), float(values.max())
    result = stats.bootstrap((values,), iqm, method="percentile", n_resamples=2000, rng=np.random.default_rng(0))
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def solved_at(run: dict[str, Any], what: str) -> float:
    """Steps or seconds until an evaluation first reached 200; infinite if none did."""
    return min((point[what] for point in run["evaluations"] if point["mean_return"] >= SOLVED), default=np.inf)


def finals(env_id: str, name: str) -> np.ndarray:
    """The final return of each finished run."""
    return np.array([np.mean(run["final_returns"]) for run in read(env_id, name) if run["final_returns"]])


def cells(returns: np.ndarray) -> str:
    """The columns of final returns: IQM, worst and best."""
    # One seed has no interval
    span = "" if len(returns) < 2 else " [{:.1f}, {:.1f}]".format(*interval(returns))
    return f"{iqm(returns):.1f}{span} | {returns.min():.1f}, {returns.max():.1f}"


def table() -> str:
    """One row for each environment and algorithm with finished runs."""
    lines = [
        "| environment | algorithm | seeds | steps | return: IQM [95 % interval] | worst and best seed | seconds a run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for folder in sorted(FOLDER.glob("*/*")):
        runs = [run for run in read(folder.parent.name, folder.name) if run["final_returns"]]
        # The race is to the first pass, and the advantage functions have a page of their own
        if not runs or folder.name.startswith(("race-", ADVANTAGE)):
            continue
        steps = np.median([run["timesteps"] for run in runs])
        seconds = np.median([run["seconds"] for run in runs])
        lines.append(
            f"| {folder.parent.name} | {folder.name} | {len(runs)} | {steps / 1e6:.2g} M "
            f"| {cells(finals(folder.parent.name, folder.name))} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def advantage_table() -> str:
    """One row for each environment and advantage function."""
    lines = [
        "| environment | `advantage` | seeds | return: IQM [95 % interval] | worst and best seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for env_id in advantage_envs():
        for name in ADVANTAGE_COLORS:
            returns = finals(env_id, ADVANTAGE + name)
            if len(returns):
                lines.append(f"| {env_id} | {name} | {len(returns)} | {cells(returns)} |")
    return "\n".join(lines)


def advantage_envs() -> list[str]:
    """The environments on which the advantage functions have been compared, the lander first."""
    return sorted({path.parent.name for path in FOLDER.glob(f"*/{ADVANTAGE}*")}, reverse=True)


def band(axes: Any, runs: list[dict[str, Any]], what: str, color: str, label: str) -> None:
    """Median and interquartile band over runs of the evaluations, against steps or seconds."""
    # Runs that stopped at their aim are shown as far as all of a kind go
    end = min(run["evaluations"][-1][what] for run in runs)
    grid = np.linspace(0, end, 60)[1:]
    returns = [
        np.interp(grid, [p[what] for p in run["evaluations"]], [p["mean_return"] for p in run["evaluations"]]) for run in runs
    ]
    low, middle, high = np.percentile(returns, [25, 50, 75], axis=0)
    axes.plot(grid, middle, color=color, label=f"{label}, {len(runs)} seeds")
    axes.fill_between(grid, low, high, color=color, alpha=0.2, linewidth=0)


def curves(env_id: str, path: Path) -> None:
    """The evaluations against steps and against seconds, where there are any."""
    runs_of = {name: read(env_id, name) for name in COLORS}
    # One evaluation makes no curve
    runs_of = {name: [run for run in runs if len(run["evaluations"]) > 1] for name, runs in runs_of.items()}
    if not any(runs_of.values()):
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, constrained_layout=True)
    for name, runs in runs_of.items():
        for axes, what in zip(panels, ("steps", "seconds"), strict=True):
            if runs:
                band(axes, runs, what, COLORS[name], name.removeprefix("race-"))
    panels[0].set(xlabel="steps", ylabel="return of the deterministic policy", title=env_id)
    panels[1].set(xlabel="seconds of training, one core", xscale="log")
    for axes in panels:
        if env_id == LANDER:
            axes.axhline(SOLVED, color="gray", linestyle=":")
    panels[0].legend()
    figure.savefig(path, dpi=100)


def advantage_curves(path: Path) -> None:
    """The evaluations of the four advantage functions against steps, a panel for each environment."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    env_ids = advantage_envs()
    figure, panels = plt.subplots(1, len(env_ids), figsize=(5 * len(env_ids), 3.8), squeeze=False, constrained_layout=True)
    for axes, env_id in zip(panels[0], env_ids, strict=True):
        for name, color in ADVANTAGE_COLORS.items():
            if runs := read(env_id, ADVANTAGE + name):
                band(axes, runs, "steps", color, name)
        axes.set(xlabel="steps", title=env_id)
        if env_id == LANDER:
            axes.axhline(SOLVED, color="gray", linestyle=":")
    panels[0, 0].set_ylabel("return of the deterministic policy")
    panels[0, -1].legend()
    figure.savefig(path, dpi=100)


def below_after_pass(run: dict[str, Any], steps: int = 50_000) -> list[bool]:
    """For each evaluation from so many steps after the first that reached 200 on: whether it is below 200."""
    start = solved_at(run, "steps") + steps
    return [point["mean_return"] < SOLVED for point in run["evaluations"] if point["steps"] >= start]


def headline() -> str:
    """What the README says first of learning."""
    lines = []
    for name in ("reinforce-300k", "reinforce"):
        runs = [run for run in read(LANDER, name) if run["final_returns"]]
        if not runs:
            continue
        returns = finals(LANDER, name)
        low, high = interval(returns)
        steps = np.median([run["timesteps"] for run in runs])
        lines.append(
            f"- After {steps / 1e6:.1f} million steps, {np.sum(returns >= SOLVED)} of {len(returns)} seeds return 200 or "
            f"more: IQM {iqm(returns):.0f} [{low:.0f}, {high:.0f}], worst {returns.min():.0f} (100 deterministic episodes of "
            "each final policy)."
        )
    first = read(LANDER, "reinforce")
    steps = np.array([solved_at(run, "steps") for run in first])
    late = np.quantile(steps, 0.9, method="higher")
    lines.append(f"- The median seed first passes 200 after {np.median(steps):,.0f} steps, nine of ten within {late:,.0f}.")
    below = np.concatenate([below_after_pass(run) for run in first])
    lines.append(f"- From 50,000 steps after that on, {below.mean():.1%} of {len(below):,} evaluations are below 200.")
    # These took turns on one core
    race = {name: read(LANDER, f"race-{name}") for name in ("reinforce", "trpo", "ppo")}
    medians = {
        name: [np.median([solved_at(run, what) for run in runs]) for what in ("seconds", "steps")]
        for name, runs in race.items()
        if runs
    }
    if "reinforce" in medians:
        lines.append(
            "- Until that, in turn on one core (medians): "
            + "; ".join(
                f"{name.upper()} {seconds:.1f} seconds and {steps:,.0f} steps ({len(race[name])} seeds"
                + (f", {seconds / medians['reinforce'][0]:.1f} times as long)" if name != "reinforce" else ")")
                for name, (seconds, steps) in medians.items()
            )
            + ". TRPO and PPO have RL Zoo's settings."
        )
    return "\n".join([f"On {LANDER}, {len(first)} seeds that no tuning has seen:", "", *lines])


def main() -> None:
    for folder in sorted(FOLDER.iterdir()):
        curves(folder.name, IMAGES / f"learning_{folder.name}.png")
    fill(README, "learning", table())
    fill(README, "headline", headline())
    print(f"{table()}\n\n{headline()}")
    if advantage_envs():
        advantage_curves(IMAGES / "advantages.png")
        fill(ADVANTAGES, "advantages", advantage_table())
        print(f"\n{advantage_table()}")


if __name__ == "__main__":
    main()
