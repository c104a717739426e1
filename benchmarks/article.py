"""
Compare the article's recipe on LunarLanderContinuous-v3 with a run of the article's own code.

    python -m benchmarks.article --jobs 2

Train one model per seed with ``zoo_configs/article.yml`` and write ``results/article/seed_K.json`` (steps, seconds, mean
return and number of episodes of each batch). Existing seeds are skipped. Then plot all seeds and
``reference/article_seed0.csv`` to ``docs/images/article.png``, and update the comparison in docs/benchmarks.md.
"""

import argparse
import csv
import json
import time
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from benchmarks.common import IMAGES, PAGE, REFERENCE, RESULTS, fill, provenance, write_json
from benchmarks.learning import make_model
from sb3_reinforce.tools.report.estimates import iqm

ENV = "LunarLanderContinuous-v3"
FOLDER = RESULTS / "article"
FIGURE = IMAGES / "article.png"
TIMESTEPS = 1_200_000
#: Ticks of the axis with the episodes per batch
EPISODES = (4, 8, 16, 32)


class Batches(BaseCallback):
    """Record the mean return and the number of episodes of each batch, as in the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []
        self.started = time.perf_counter()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer  # type: ignore[attr-defined]
        returns = np.add.reduceat(buffer.rewards, np.flatnonzero(buffer.episode_starts))
        self.rows.append(
            dict(
                steps=self.num_timesteps,
                seconds=round(time.perf_counter() - self.started, 2),
                mean_return=round(float(returns.mean()), 3),
                episodes=len(returns),
            )
        )


def run(seed: int, timesteps: int) -> None:
    th.set_num_threads(1)
    batches = Batches()
    model, learning = make_model("reinforce", ENV, seed, timesteps, {}, config="article.yml")
    model.learn(learning["total_timesteps"], callback=batches)
    write_json(FOLDER / f"seed_{seed}.json", dict(provenance(), seed=seed, timesteps=timesteps, batches=batches.rows))


def smoothed(values: np.ndarray, window: int = 25) -> np.ndarray:
    """Average over the last ``window`` batches (fewer at the beginning)."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def read_runs() -> list[dict[str, np.ndarray]]:
    """Read the statistics of each batch up to ``TIMESTEPS``, by name: first the reference, then each seed."""
    with open(REFERENCE / "article_seed0.csv") as file:
        runs: list[Any] = [list(csv.DictReader(file))]
    runs += [json.loads(path.read_text())["batches"] for path in sorted(FOLDER.glob("seed_*.json"))]
    return [
        {name: np.array([float(row[name]) for row in run if float(row["steps"]) <= TIMESTEPS]) for name in run[0]}
        for run in runs
    ]


def plot(runs: list[dict[str, np.ndarray]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    shown = (("steps", "mean_return"), ("seconds", "mean_return"), ("steps", "episodes"))
    for axes, (x, y) in zip(panels, shown, strict=True):
        for run in runs[1:]:
            axes.plot(run[x], smoothed(run[y]), color="tab:blue", alpha=0.7)
        axes.lines[0].set_label(f"sb3-reinforce, {len(runs) - 1} seeds")
        axes.plot(runs[0][x], smoothed(runs[0][y]), color="black", label="the article's own code, one seed")
        axes.set(xlabel=x, ylabel="return (mean of 25 batches)")
    for axes in panels[:2]:
        axes.axhline(200, color="gray", linestyle=":", label="solved")
    figure.suptitle(f"The article's recipe on {ENV}")
    panels[1].set(xscale="log", xlim=(1, None))
    panels[2].set(ylabel="episodes per batch (mean of 25)", yscale="log", yticks=EPISODES, yticklabels=EPISODES)
    panels[2].minorticks_off()
    panels[0].legend()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=100)


def comparison(runs: list[dict[str, np.ndarray]]) -> str:
    """Summarize how the seeds compare with the reference."""
    (last, best, seconds), *seeds = [
        (run["mean_return"][-100:].mean(), run["mean_return"].max(), run["seconds"][-1]) for run in runs
    ]
    lasts, bests, times = (np.array(values) for values in zip(*seeds, strict=True))
    return (
        f"Over the last 100 batches before {TIMESTEPS / 1e6:g} million steps, our seeds return "
        f"{', '.join(f'{value:.0f}' for value in lasts)} (interquartile mean {iqm(lasts):.0f}) and the article's single seed "
        f"returns {last:.0f}; {np.sum(lasts < last)} of our {len(lasts)} seeds return less. The best single batch returns "
        f"{bests.min():.0f} to {bests.max():.0f}, compared to {best:.0f}. Training takes {times.min():.0f} to "
        f"{times.max():.0f} seconds, compared to {seconds:.0f} with the article's code."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--timesteps", type=int, default=TIMESTEPS)
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel processes, with one thread each")
    arguments = parser.parse_args()
    missing = [seed for seed in arguments.seeds if not (FOLDER / f"seed_{seed}.json").exists()]
    with get_context("spawn").Pool(arguments.jobs) as pool:
        pool.starmap(run, [(seed, arguments.timesteps) for seed in missing], chunksize=1)
    runs = read_runs()
    plot(runs)
    fill(PAGE, "article", comparison(runs))
    print(f"{comparison(runs)}\nWrote {FIGURE}")


if __name__ == "__main__":
    main()
