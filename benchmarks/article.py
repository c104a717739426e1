"""
The article's recipe on LunarLanderContinuous-v3, against a run of the article's own code.

    python -m benchmarks.article --jobs 2

trains one model a seed with the constructor's defaults, writes ``results/article/seed_K.json`` (one entry a batch: steps,
seconds, mean return, episodes), skips the seeds that are there already, and plots them all beside
``reference/article_seed0.csv`` into ``docs/images/article.png``.
"""

import argparse
import csv
import json
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from benchmarks.common import REFERENCE, RESULTS, provenance, write_json
from sb3_reinforce import REINFORCE

ENV = "LunarLanderContinuous-v3"
FOLDER = RESULTS / "article"
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "article.png"


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
    REINFORCE("MlpPolicy", ENV, seed=seed, device="cpu").learn(timesteps, callback=batches)
    write_json(FOLDER / f"seed_{seed}.json", dict(provenance(), seed=seed, timesteps=timesteps, batches=batches.rows))


def smoothed(values: np.ndarray, window: int = 25) -> np.ndarray:
    """Mean over the last ``window`` batches (over those there are, at the beginning)."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    paths = sorted(FOLDER.glob("seed_*.json"))
    for path in paths:
        rows = json.loads(path.read_text())["batches"]
        steps, returns = (np.array([row[key] for row in rows]) for key in ("steps", "mean_return"))
        label = f"sb3-reinforce, {len(paths)} seeds" if path == paths[0] else None
        axes.plot(steps, smoothed(returns), color="tab:blue", alpha=0.7, label=label)
        print(f"{path.stem}: last 100 batches {returns[-100:].mean():.0f}, best batch {returns.max():.0f}")
    with open(REFERENCE / "article_seed0.csv") as file:
        reference = list(csv.DictReader(file))
    steps, returns = (np.array([float(row[key]) for row in reference]) for key in ("steps", "mean_return"))
    axes.plot(steps, smoothed(returns), color="black", label="the article's own code, seed 0")
    within = steps <= 1.2e6
    print(f"reference to 1.2 M steps: last 100 batches {returns[within][-100:].mean():.0f}, best {returns[within].max():.0f}")
    axes.axhline(200, color="gray", linestyle=":", label="solved")
    axes.set(xlabel="steps", ylabel="return, mean of 25 batches", title=f"The article's recipe on {ENV}", xlim=(0, 1.2e6))
    axes.legend()
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=100)
    print(f"Wrote {FIGURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--timesteps", type=int, default=1_200_000)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, each with one thread")
    arguments = parser.parse_args()
    missing = [seed for seed in arguments.seeds if not (FOLDER / f"seed_{seed}.json").exists()]
    with get_context("spawn").Pool(arguments.jobs) as pool:
        pool.starmap(run, [(seed, arguments.timesteps) for seed in missing], chunksize=1)
    plot()


if __name__ == "__main__":
    main()
