"""
Train REINFORCE on LunarLanderContinuous-v3 with the settings of zoo_configs/reinforce.yml, evaluate it, and leave everything
there is to see in one folder.

    python -m benchmarks.train                 # what `make train` runs
    python -m benchmarks.train --seed 1 --timesteps 300000

The folder (named at the beginning and at the end) holds the model, monitor.csv (return, length and time of every training
episode), the TensorBoard log, a learning curve, a video of one episode of the trained policy, and a summary of it all.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import ResultsWriter

from benchmarks.common import provenance, write_json
from benchmarks.learning import EVALUATION_SEED, evaluation_env, make_model
from sb3_reinforce import REINFORCE

ENV = "LunarLanderContinuous-v3"
SOLVED = 200.0


class EpisodeLog(BaseCallback):
    """Writes the episodes that are learned from into one monitor.csv, whichever environment they come from."""

    def __init__(self, folder: Path):
        super().__init__()
        self.writer = ResultsWriter(str(folder), header={"t_start": time.time(), "env_id": ENV})

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self.writer.write_row(info["episode"])
        return True

    def _on_training_end(self) -> None:
        self.writer.close()


def new_folder(parent: Path) -> Path:
    """The first of parent/LunarLanderContinuous-v3_1, _2, ... that is not there yet."""
    number = 1
    while (folder := parent / f"{ENV}_{number}").exists():
        number += 1
    folder.mkdir(parents=True)
    return folder


def plot_learning_curve(monitor: Path, picture: Path) -> None:
    """Return against steps: each training episode, and the mean of the last 100."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    returns, lengths = np.loadtxt(monitor, delimiter=",", skiprows=2, usecols=(0, 1), ndmin=2).T
    steps = np.cumsum(lengths)
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    axes.plot(steps, returns, ".", markersize=2, alpha=0.25, color="tab:blue", label="one episode")
    if len(returns) >= 100:
        mean = np.convolve(returns, np.full(100, 0.01), mode="valid")
        axes.plot(steps[99:], mean, color="tab:orange", linewidth=2, label="mean of 100 episodes")
    axes.axhline(SOLVED, color="gray", linestyle=":", label="solved")
    low = np.quantile(returns, 0.01)
    axes.set(xlabel="steps", ylabel="return", title=f"REINFORCE on {ENV} (actions sampled)", ylim=(min(low, -100), 330))
    axes.legend(loc="lower right")
    figure.savefig(picture, dpi=120)


def record_video(model: REINFORCE, path: Path, tries: int = 10) -> float:
    """
    Record one episode of the deterministic policy: the first that reaches 200, or the last of a few tries.

    :return: its return
    """
    import imageio.v3 as imageio

    env = gym.make(ENV, render_mode="rgb_array")
    for seed in range(EVALUATION_SEED, EVALUATION_SEED + tries):
        frames: list[Any] = []
        episode_return, over = 0.0, False
        observation, _ = env.reset(seed=seed)
        while not over:
            frames.append(env.render())
            action, _ = model.predict(observation, deterministic=True)
            observation, reward, terminated, truncated, _ = env.step(action)
            episode_return += float(reward)
            over = terminated or truncated
        if episode_return >= SOLVED:
            break
    env.close()
    # The frames are 600 x 400, multiples of 8
    imageio.imwrite(path, np.stack(frames), fps=50, macro_block_size=8)
    return episode_return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timesteps", type=int, help="if not those of the file")
    parser.add_argument("--evaluation-episodes", type=int, default=100)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where to make the folder")
    arguments = parser.parse_args()
    try:
        import imageio_ffmpeg  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"{error}. Pictures and videos need: pip install 'sb3-reinforce[plots]'") from error
    # No window is needed to draw frames
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    # Networks of this size are fastest on one thread
    th.set_num_threads(1)

    folder = new_folder(arguments.runs)
    tensorboard = folder / "tensorboard"
    model, learning, settings = make_model(
        "reinforce", ENV, arguments.seed, arguments.timesteps, {}, tensorboard_log=str(tensorboard)
    )
    timesteps = learning["total_timesteps"]
    print(f"Training on {ENV} for {timesteps:,} steps; everything goes to {folder}")
    started = time.perf_counter()
    model.learn(timesteps, callback=[EpisodeLog(folder), *learning["callback"]], progress_bar=True)
    seconds = time.perf_counter() - started
    model.save(folder / "model")
    plot_learning_curve(folder / "monitor.csv", folder / "learning_curve.png")

    print(f"Evaluating the deterministic policy over {arguments.evaluation_episodes} episodes")
    n_episodes = arguments.evaluation_episodes
    returns, lengths = evaluate_policy(model, evaluation_env(model), n_episodes, return_episode_rewards=True)
    assert isinstance(returns, list)
    video_return = record_video(model, folder / "landing.mp4")

    origin = provenance()
    write_json(
        folder / "result.json",
        dict(origin, seed=arguments.seed, steps=model.num_timesteps, seconds=seconds, returns=returns, lengths=lengths),
    )
    rate = model.num_timesteps / seconds
    rows = {
        f"return of the deterministic policy, {len(returns)} new episodes": f"{np.mean(returns):.1f} ± {np.std(returns):.1f}",
        f"episodes of these with at least {SOLVED:.0f}": f"{np.mean(np.array(returns) >= SOLVED):.0%}",
        "mean length of these": f"{np.mean(lengths):.0f} steps",
        "training": f"{model.num_timesteps:,} steps, {model._n_updates} updates, {seconds:.0f} s, {rate:,.0f} steps/s",
        "seed": arguments.seed,
        "settings": ", ".join(f"{name}={value}" for name, value in settings.items()),
        "versions": ", ".join([f"Python {origin['python']}", *(f"{k} {v}" for k, v in origin["versions"].items())]),
        "command": f"`{origin['command']}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    summary = f"""# REINFORCE on {ENV}

| | |
| --- | --- |
{table}

- `model.zip`: `REINFORCE.load("{folder}/model")`
- `learning_curve.png`, `monitor.csv`: return and length of every training episode
- `landing.mp4`: one episode of the deterministic policy, return {video_return:.0f}
- `result.json`: the figures above for programs, with the return and length of each evaluation episode
- `tensorboard/`: `tensorboard --logdir {folder}/tensorboard`
"""
    (folder / "summary.md").write_text(summary, encoding="utf-8")
    print(summary)
    print(f"Everything is in {folder}: return {np.mean(returns):.1f} ± {np.std(returns):.1f} over {len(returns)} episodes")


if __name__ == "__main__":
    main()
