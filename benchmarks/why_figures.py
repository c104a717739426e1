"""
Generate the figures and tables of docs/why.md from the results of `benchmarks.why`.

    python -m benchmarks.why_figures
"""

import textwrap
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd

from benchmarks import why
from benchmarks.common import IMAGES, WHY, fill, read_folder
from sb3_reinforce.tools.report.estimates import number
from sb3_reinforce.tools.report.runs import Run
from sb3_reinforce.tools.report.symptoms import SYMPTOMS, find_symptoms

COLORS = {"fails": "tab:red", "cured": "tab:blue"}


def runs_of(name: str) -> dict[str, list[dict[str, Any]]]:
    """Read the runs of a symptom, by "fails" and "cured"."""
    return dict(zip(COLORS, map(read, why.PAIRS[name]), strict=True))


def read(run: str) -> list[dict[str, Any]]:
    return read_folder(why.FOLDER / run)


def report_run(run: dict[str, Any]) -> Run:
    """Convert a result to the run of a report."""
    episodes = pd.DataFrame(run["episodes"], columns=["steps", "r", "l"])
    scalars = {tag: tuple(np.array(points, dtype=float).T) for tag, points in run["log"].items()}
    threshold = gym.spec(run["env"]).reward_threshold
    return Run(Path(run["run"]), run["run"], run["env"], episodes=episodes, scalars=scalars, threshold=threshold)


def is_complete(name: str) -> bool:
    """Whether both runs have results of the same seeds, at least two."""
    fails, cured = (tuple(run["seed"] for run in runs) for runs in runs_of(name).values())
    return fails == cured and len(fails) > 1


def draw(name: str, path: Path) -> None:
    """Plot the log key of the symptom and the training return of all runs against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = list(dict.fromkeys((SYMPTOMS[name].key, "rollout/ep_rew_mean")))
    figure, panels = plt.subplots(1, len(keys), figsize=(4 * len(keys), 2.6), constrained_layout=True, squeeze=False)
    for axes, key in zip(panels[0], keys, strict=True):
        for kind, runs in runs_of(name).items():
            for run in runs:
                steps, values = np.array(run["log"].get(key, np.empty((0, 2)))).T
                axes.plot(steps, values, color=COLORS[kind], linewidth=1, label=kind if run is runs[0] else None)
        axes.set(xlabel="steps", title=key)
        axes.grid(alpha=0.3)
    if SYMPTOMS[name].key == "train/explained_variance":
        panels[0, 0].set_ylim(-1, 1)
    panels[0, 0].legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def table(name: str) -> str:
    """Create a table with a row for each of the two runs."""
    lines = ["| run | settings | seeds | return: mean | worst, best | updates | the report finds it |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for kind, runs in runs_of(name).items():
        returns = np.array([run["final_return"] for run in runs])
        found = [any(symptom is SYMPTOMS[name] for symptom, _ in find_symptoms(report_run(run))) for run in runs]
        settings = runs[0]["settings"] if runs[0]["settings"] in ("defaults", "shaped reward") else f"`{runs[0]['settings']}`"
        lines.append(
            f"| {kind} | {runs[0]['env']}, {settings} | {len(runs)} | {number(returns.mean())} "
            f"| {number(returns.min())}, {number(returns.max())} | {np.mean([run['updates'] for run in runs]):.0f} "
            f"| {sum(found)} of {len(runs)} |"
        )
    return "\n".join(lines)


def block(name: str) -> str:
    """Generate the section of a symptom: the texts of the report, the figure and the table."""
    symptom = SYMPTOMS[name]
    if not is_complete(name):
        return f"Not measured yet: `python -m benchmarks.why --runs {' '.join(why.PAIRS[name])}`."
    for run in runs_of(name)["fails"]:
        if values := dict(find_symptoms(report_run(run))).get(symptom):
            break
    parts = [
        f"**In the log** of seed {run['seed']}. {values}",
        f"**Why.** {symptom.meaning}",
        f"**What to try.** {symptom.cure}",
    ]
    parts = [textwrap.fill(part, 125, break_on_hyphens=False) for part in parts]
    parts += [f"![{symptom.key} and return against steps, failing and cured](images/why_{name}.png)", table(name)]
    return "\n\n".join(parts)


def main() -> None:
    for name in why.PAIRS:
        if is_complete(name):
            draw(name, IMAGES / f"why_{name}.png")
        fill(WHY, f"why-{name}", block(name))


if __name__ == "__main__":
    main()
