"""
The article's recipe on LunarLanderContinuous-v3, against a run of the article's own code.

    python -m benchmarks.article --jobs 2

trains one model a seed with ``zoo_configs/article.yml``, writes ``results/article/seed_K.json`` (one entry a batch: steps,
seconds, mean return, episodes), skips the seeds that are there already, plots them all beside
``reference/article_seed0.csv`` into ``docs/images/article.png``, and says in the README how they compare.
"""

import argparse
import csv
import json
import time
from multiprocessing import get_context

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from benchmarks.common import IMAGES, REFERENCE, RESULTS, fill_readme, provenance, write_json
from benchmarks.learning import make_model

ENV = "LunarLanderContinuous-v3"
FOLDER = RESULTS / "article"
FIGURE = IMAGES / "article.png"
TIMESTEPS = 1_200_000


class Batches(BaseCallback):
    """Mean return and number of episodes of each batch, as in the reference."""

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
    """Mean over the last ``window`` batches (over those there are, at the beginning)."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def read_runs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps and mean return of each batch up to ``TIMESTEPS``: of the reference, then of each seed."""
    with open(REFERENCE / "article_seed0.csv") as file:
        runs = [[(float(row["steps"]), float(row["mean_return"])) for row in csv.DictReader(file)]]
    for path in sorted(FOLDER.glob("seed_*.json")):
        runs.append([(row["steps"], row["mean_return"]) for row in json.loads(path.read_text())["batches"]])
    arrays = [np.array(run).T for run in runs]
    return [(steps[steps <= TIMESTEPS], returns[steps <= TIMESTEPS]) for steps, returns in arrays]


def plot(runs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for steps, returns in runs[1:]:
        axes.plot(steps, smoothed(returns), color="tab:blue", alpha=0.7)
    axes.lines[0].set_label(f"sb3-reinforce, {len(runs) - 1} seeds")
    axes.plot(runs[0][0], smoothed(runs[0][1]), color="black", label="the article's own code, one seed")
    axes.axhline(200, color="gray", linestyle=":", label="solved")
    axes.set(xlabel="steps", ylabel="return, mean of 25 batches", title=f"The article's recipe on {ENV}", xlim=(0, TIMESTEPS))
    axes.legend()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=100)


def comparison(runs: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """One sentence on how the seeds compare with the reference."""
    (last, best), *seeds = [(returns[-100:].mean(), returns.max()) for _, returns in runs]
    lasts, bests = zip(*seeds, strict=True)
    return (
        f"Over the last 100 batches before {TIMESTEPS / 1e6:g} million steps, our seeds return "
        f"{', '.join(f'{value:.0f}' for value in lasts)} and the article's code {last:.0f}; the best single batch is "
        f"{min(bests):.0f} to {max(bests):.0f} against {best:.0f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--timesteps", type=int, default=TIMESTEPS)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, each with one thread")
    arguments = parser.parse_args()
    missing = [seed for seed in arguments.seeds if not (FOLDER / f"seed_{seed}.json").exists()]
    with get_context("spawn").Pool(arguments.jobs) as pool:
        pool.starmap(run, [(seed, arguments.timesteps) for seed in missing], chunksize=1)
    runs = read_runs()
    plot(runs)
    fill_readme("article", comparison(runs))
    print(f"{comparison(runs)}\nWrote {FIGURE}")


if __name__ == "__main__":
    main()
