"""
Measure the speed of `learn()` with one, two and many workers, and the overhead per batch.

    python -m benchmarks.workers

All rates are measured in turn, from the second batch on, which excludes the start of processes. On the lander, actions are
random as in ``benchmarks.throughput``, except for A2C, which learns with its defaults. The curve up to 64 workers uses threads
and environments that sleep instead of computing, so that one core is enough. A least-squares fit of the curve shows what
limits the speed. Write ``results/workers.json``, ``docs/images/workers.png`` and the tables in ``docs/scaling.md``.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import SubprocVecEnv

from benchmarks.common import IMAGES, RESULTS, SCALING, fill, provenance, write_json
from benchmarks.throughput import LANDER, environment_alone, make_model
from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes.tasks import pack_config, run_episodes
from sb3_reinforce.tools import EnvPoolVecEnv

BATCH = 4000
N_THREADS = [1, 2, 4, 8, 16, 32, 64]
#: Seconds per step of the sleeping environment, and number of its episodes per batch and worker
SLEEP = 0.005
EPISODES = 8
#: Mean and maximum length of its episodes
MEAN_STEPS, MOST_STEPS = 40, 60
#: Number of EnvPool environments
N_ENVS = 16


class Sleeper(gym.Env):
    """Episodes of 20 to 60 steps that sleep instead of computing."""

    observation_space = spaces.Box(-1, 1, (8,))
    action_space = spaces.Box(-1, 1, (2,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(2 * MEAN_STEPS - MOST_STEPS, MOST_STEPS + 1))
        return np.zeros(8, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        time.sleep(SLEEP)
        self.left -= 1
        return np.zeros(8, dtype=np.float32), float(action[0]), self.left == 0, False, {}


class Clock(KVWriter):
    """Measure the transitions per second from the second batch on, from a log, since callbacks cost time in each step."""

    def __init__(self, model: REINFORCE):
        self.marks: list[tuple[float, int]] = []
        self.n_discarded = 0
        model.set_logger(Logger(folder=None, output_formats=[self]))

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.marks.append((time.perf_counter(), step))
        self.n_discarded = key_values.get("time/discarded_steps", 0)

    def close(self) -> None: ...

    def rate(self) -> float:
        (first, before), (last, after) = self.marks[0], self.marks[-1]
        return (after - before) / (last - first)


def lander_rate(workers: int | None, n_steps: int, updates: bool = True) -> tuple[float, float]:
    """Measure the transitions per second of REINFORCE on the lander, and the share of discarded transitions."""
    model = make_model(REINFORCE, LANDER, BATCH, workers=workers)
    if not updates:
        model.train = lambda: None
    clock = Clock(model)
    model.learn(n_steps)
    return clock.rate(), clock.n_discarded / (clock.n_discarded + model.num_timesteps)


def step_alone(n_steps: int) -> float:
    return environment_alone(LANDER)(n_steps)


def processes_rate(n_steps: int) -> float:
    """Measure the steps per second of the environment alone in two processes together: what the cores allow."""
    with get_context("spawn").Pool(2) as pool:
        pool.map(step_alone, [100, 100], chunksize=1)
        return sum(pool.map(step_alone, [n_steps, n_steps], chunksize=1))


def sleeper_rate(workers: Any, n_episodes: int) -> float:
    """Measure the transitions per second of REINFORCE on the sleeping environment."""
    model = REINFORCE("MlpPolicy", Sleeper, n_steps=None, n_episodes=n_episodes, seed=0, device="cpu", workers=workers)
    clock = Clock(model)
    model.learn(4 * n_episodes * MEAN_STEPS)
    return clock.rate()


def a2c_rate(n_steps: int) -> float:
    """Measure the transitions per second of A2C with default hyperparameters on two processes."""
    env = make_vec_env(LANDER, 2, env_kwargs=dict(render_mode=None), vec_env_cls=SubprocVecEnv)
    started = time.perf_counter()
    A2C("MlpPolicy", env, seed=0, device="cpu").learn(n_steps)
    seconds = time.perf_counter() - started
    env.close()
    return n_steps / seconds


def pool_rate(n_steps: int) -> float:
    """Measure the steps per second of EnvPool alone, with one thread and all environments at once."""
    env = EnvPoolVecEnv(LANDER, N_ENVS)
    actions = np.random.default_rng(0).standard_normal((n_steps // N_ENVS, N_ENVS, 2), dtype=np.float32).clip(-1, 1)
    env_ids = np.arange(N_ENVS, dtype=np.int32)
    env.pool.reset(env_ids)
    started = time.perf_counter()
    for step in actions:
        _, _, terminated, truncated, _ = env.pool.step(step, env_ids)
        if len(ends := env_ids[terminated | truncated]):
            env.pool.reset(ends)
    seconds = time.perf_counter() - started
    env.close()
    return len(actions) * N_ENVS / seconds


def pool_learn_rate(n_steps: int, updates: bool = True) -> float:
    """Measure the transitions per second of REINFORCE on EnvPool, in batches of at least 16,384."""
    env = EnvPoolVecEnv(LANDER, N_ENVS)
    model = make_model(REINFORCE, env, 16_384 // N_ENVS)
    if not updates:
        model.train = lambda: None
    clock = Clock(model)
    model.learn(n_steps)
    env.close()
    return clock.rate()


def added_seconds(n_batches: int) -> list[float]:
    """Measure the overhead of each batch: seconds of a rollout with one worker, minus seconds of its episodes."""
    model = make_model(REINFORCE, LANDER, BATCH, workers=1)
    added: list[float] = []

    class Compare(BaseCallback):
        def _on_step(self) -> bool:
            self.last_step = time.perf_counter()
            return True

        def _on_rollout_start(self) -> None:
            self.started = time.perf_counter()
            self.first = model._next_episode

        def _on_rollout_end(self) -> None:
            seconds = self.last_step - self.started
            content = pack_config(model)
            name = f"from episode {self.first}"
            run_episodes(name, content, range(1))
            started = time.perf_counter()
            n_episodes = int(model.rollout_buffer.episode_starts.sum())
            run_episodes(name, content, range(self.first, self.first + n_episodes))
            added.append(seconds - (time.perf_counter() - started))

    model.learn(n_batches * BATCH, callback=Compare())
    return added[1:]


def bounds(curve: dict[str, list[float]]) -> tuple[float, float]:
    """
    Fit the seconds of a batch with W workers and E episodes of T steps per worker by E T a + W E T b, with least squares.

    :return: a, the seconds per step in a worker, and b, the seconds per transition in the main process
    """
    n = np.array(N_THREADS, dtype=float)
    steps = n * EPISODES * MEAN_STEPS
    seconds = steps / np.array([np.median(curve[str(w)]) for w in N_THREADS])
    # Minimize relative errors
    design = np.column_stack([np.full_like(n, EPISODES * MEAN_STEPS), steps]) / seconds[:, None]
    a, b = np.linalg.lstsq(design, np.ones_like(n), rcond=None)[0]
    return float(a), float(b)


def plot(curve: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    a, b = bounds(curve)
    figure, axes = plt.subplots(figsize=(6, 3.8), constrained_layout=True)
    axes.plot(N_THREADS, [n / SLEEP for n in N_THREADS], ":", color="gray", label="linear scaling without overhead")
    axes.plot(N_THREADS, [1 / (a / n + b) for n in N_THREADS], "--", color="tab:blue", label="fit")
    axes.plot(N_THREADS, [np.median(curve[str(n)]) for n in N_THREADS], "o", color="tab:blue", label="learn()")
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="transitions per second")
    axes.set_xticks(N_THREADS, labels=[str(n) for n in N_THREADS])
    axes.set_title(f"Steps of {SLEEP * 1000:.0f} ms, {EPISODES} episodes per batch and worker")
    axes.minorticks_off()
    axes.legend()
    figure.savefig(IMAGES / "workers.png", dpi=100)


def table(result: dict[str, Any]) -> str:
    rates = {name: float(np.median(values)) for name, values in result["rates"].items()}
    one, two = rates["lander, 1 worker"], rates["lander, 2 workers"]
    alone = rates["lander, environment alone"]
    pool = rates["EnvPool alone"]
    rows = [
        ("lander: 2 workers, times 1 worker", "at least 1.75", f"{two / one:.2f}"),
        (
            "the same, if updates took no time",
            "",
            f"{rates['lander, 2 workers, rollouts only'] / rates['lander, 1 worker, rollouts only']:.2f}",
        ),
        ("lander alone: 2 processes, times 1", "", f"{rates['lander, environment alone twice'] / alone:.2f}"),
        (
            "sleeping environment: 2 workers, times 1 worker",
            "at least 1.95",
            f"{rates['sleeper, 2 workers'] / rates['sleeper, 1 worker']:.2f}",
        ),
        ("overhead of a batch of 4,000, milliseconds", "at most 15", f"{np.median(result['added']) * 1000:.1f}"),
        ("lander: 2 workers, times A2C on `SubprocVecEnv(2)`", "at least 5", f"{two / rates['lander, A2C']:.1f}"),
        ("lander: 1 worker, share of the environment alone", "at least 0.65", f"{one / alone:.2f}"),
        ("lander: no workers, share of the environment alone", "at least 0.65", f"{rates['lander, no workers'] / alone:.2f}"),
        ("lander: discarded steps with 2 workers", "", f"{np.median(result['discarded']):.1%}"),
        (f"EnvPool, {N_ENVS} environments: share of EnvPool alone", "at least 0.65", f"{rates['EnvPool'] / pool:.2f}"),
        ("the same, if updates took no time", "", f"{rates['EnvPool, rollouts only'] / pool:.2f}"),
        (
            f"EnvPool, {N_ENVS} environments: times no workers",
            "",
            f"{rates['EnvPool'] / rates['lander, no workers']:.2f}",
        ),
    ]
    lines = ["| metric | target | measured |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    lines.append(
        f"\nThe environment alone runs at {alone:,.0f} steps per second, and EnvPool alone at {pool:,.0f} on one thread."
    )
    return "\n".join(lines)


def paper(curve: dict[str, list[float]]) -> str:
    """Describe the fit, and its predictions for more workers."""
    a, b = bounds(curve)
    measured = np.median(curve["64"])
    lines = [
        f"A step takes {a * 1000:.2f} ms in a worker, including {SLEEP * 1000:.0f} ms of sleep. A transition takes "
        f"{b * 1e6:.0f} µs in the process that all threads share: acting, merging, callbacks and the update.",
        f"For 64 workers, the fit predicts {1 / (a / 64 + b):,.0f} transitions per second; {measured:,.0f} were measured. For "
        f"1,000 workers, it predicts {1 / (a / 1000 + b):,.0f}, {a / (a / 1000 + b):.0f} times the speed of one worker. With "
        f"more than {a / b:.0f} workers, the main process is the bottleneck.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60_000, help="number of steps per run on the lander")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    measures: dict[str, Any] = {
        "lander, no workers": partial(lander_rate, None, arguments.steps),
        "lander, 1 worker": partial(lander_rate, 1, arguments.steps),
        "lander, 2 workers": partial(lander_rate, 2, arguments.steps),
        "lander, 1 worker, rollouts only": partial(lander_rate, 1, arguments.steps, updates=False),
        "lander, 2 workers, rollouts only": partial(lander_rate, 2, arguments.steps, updates=False),
        "lander, A2C": partial(a2c_rate, arguments.steps // 4),
        "lander, environment alone": partial(environment_alone(LANDER), arguments.steps // 2),
        "lander, environment alone twice": partial(processes_rate, arguments.steps // 2),
        "EnvPool alone": partial(pool_rate, arguments.steps),
        "EnvPool": partial(pool_learn_rate, 2 * arguments.steps),
        "EnvPool, rollouts only": partial(pool_learn_rate, 2 * arguments.steps, updates=False),
        "sleeper, 1 worker": partial(sleeper_rate, 1, 48),
        "sleeper, 2 workers": partial(sleeper_rate, 2, 48),
    }
    result: dict[str, Any] = dict(provenance(), rates={name: [] for name in measures}, discarded=[], added=[], curve={})
    for _ in range(arguments.repeats):
        for name, measure in measures.items():
            rate = measure()
            if isinstance(rate, tuple):
                rate, discarded = rate
                if name == "lander, 2 workers":
                    result["discarded"].append(discarded)
            result["rates"][name].append(rate)
            print(f"{name}: {rate:,.0f} transitions per second", flush=True)
        result["added"] += added_seconds(10)
        for n_threads in N_THREADS:
            with ThreadPoolExecutor(n_threads) as executor:
                rate = sleeper_rate(executor, EPISODES * n_threads)
            result["curve"].setdefault(str(n_threads), []).append(rate)
            print(f"sleeper, {n_threads} workers: {rate:,.0f} transitions per second", flush=True)
    write_json(RESULTS / "workers.json", result)
    plot(result["curve"])
    fill(SCALING, "workers", table(result))
    fill(SCALING, "paper", paper(result["curve"]))
    print(table(result), paper(result["curve"]), sep="\n\n")


if __name__ == "__main__":
    main()
