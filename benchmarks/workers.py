"""
What workers are worth: transitions a second of `learn()` with one, two and many, and what a batch costs beyond its episodes.

    python -m benchmarks.workers                   # ten minutes on two cores

Rates are ratios of what is measured in turn in one run, from the second batch on: starting processes is not part of them. On
the lander all act at random, as in ``benchmarks.throughput``. The curve to 64 workers has threads, and environments that sleep
instead of computing, so that one core is enough for them; a straight line through it says what bounds a batch. Writes
``results/workers.json``, ``docs/images/workers.png`` and the tables in ``docs/scaling.md``.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from benchmarks.common import IMAGES, RESULTS, SCALING, fill, provenance, write_json
from benchmarks.throughput import LANDER, environment_alone, make_model
from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes.tasks import run_episodes
from sb3_reinforce.episodes.workers import make_job
from sb3_reinforce.tools.envpool import EnvPoolVecEnv

BATCH = 4000
N_THREADS = [1, 2, 4, 8, 16, 32, 64]
#: Seconds of a step of the environment that sleeps, and its episodes in a batch for each of many workers
SLEEP = 0.005
EPISODES = 8
#: Mean steps of its episodes, and the most
MEAN_STEPS, MOST_STEPS = 40, 60
#: Environments of a pool
MEMBERS = 16


class Sleeper(gym.Env):
    """Episodes of 20 to 60 steps, each of which takes as long, and no work."""

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


class Clock(BaseCallback):
    """Transitions a second from the second batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[float, int]] = []

    def _on_rollout_start(self) -> None:
        self.marks.append((time.perf_counter(), self.model.num_timesteps))

    def _on_step(self) -> bool:
        return True

    def rate(self) -> float:
        (first, before), (last, after) = self.marks[1], self.marks[-1]
        return (after - before) / (last - first)


def lander_rate(workers: int | None, n_steps: int) -> tuple[float, float]:
    """Transitions a second of REINFORCE on the lander, in batches of 4,000, and what share of them was thrown away."""
    model = make_model(REINFORCE, LANDER, BATCH, workers=workers)
    discarded = []

    class Note(Clock):
        def _on_rollout_end(self) -> None:
            if workers is not None:
                discarded.append(model._running_workers.n_discarded)

    callback = Note()
    model.learn(n_steps, callback=callback)
    return callback.rate(), discarded[-1] / model.num_timesteps if discarded else 0.0


def sleeper_rate(workers: Any, n_episodes: int) -> float:
    """Transitions a second of REINFORCE where a step sleeps, in batches of so many episodes."""
    model = REINFORCE("MlpPolicy", Sleeper, n_episodes=n_episodes, seed=0, device="cpu", workers=workers)
    callback = Clock()
    model.learn(4 * n_episodes * MEAN_STEPS, callback=callback)
    return callback.rate()


def a2c_rate(n_steps: int) -> float:
    """Transitions a second of A2C with SB3's settings on two processes."""
    env = make_vec_env(LANDER, 2, env_kwargs=dict(render_mode=None), vec_env_cls=SubprocVecEnv)
    started = time.perf_counter()
    A2C("MlpPolicy", env, seed=0, device="cpu").learn(n_steps)
    seconds = time.perf_counter() - started
    env.close()
    return n_steps / seconds


def pool_rate(n_steps: int) -> float:
    """Steps a second of EnvPool's simulator alone, one thread, all members at once."""
    env = EnvPoolVecEnv(LANDER, MEMBERS)
    actions = np.random.default_rng(0).standard_normal((n_steps // MEMBERS, MEMBERS, 2), dtype=np.float32).clip(-1, 1)
    members = np.arange(MEMBERS, dtype=np.int32)
    env.pool.reset(members)
    started = time.perf_counter()
    for step in actions:
        _, _, terminated, truncated, _ = env.pool.step(step, members)
        if len(ends := members[terminated | truncated]):
            env.pool.reset(ends)
    seconds = time.perf_counter() - started
    env.close()
    return len(actions) * MEMBERS / seconds


def pool_learn_rate(n_steps: int) -> float:
    """Transitions a second of REINFORCE on it, in batches of at least 16,384."""
    env = EnvPoolVecEnv(LANDER, MEMBERS)
    callback = Clock()
    make_model(REINFORCE, env, 16_384 // MEMBERS).learn(n_steps, callback=callback)
    env.close()
    return callback.rate()


def added_seconds(n_batches: int) -> list[float]:
    """Seconds from the start of a rollout by one worker to its last step, beyond running the same episodes, batch by batch."""
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
            job = make_job(model)
            content = job.pack()
            name = f"from episode {self.first}"
            run_episodes(name, content, 0, 1)
            started = time.perf_counter()
            n_episodes = int(model.rollout_buffer.episode_starts.sum())
            run_episodes(name, content, self.first, n_episodes)
            added.append(seconds - (time.perf_counter() - started))

    model.learn(n_batches * BATCH, callback=Compare())
    return added[1:]


def bounds(curve: dict[str, list[float]]) -> tuple[float, float]:
    """
    What bounds a batch, from rates with W workers and E episodes of T steps each: E T a + W E T b seconds, by least squares.

    :return: a, seconds of a step in a worker, and b, those of a transition in the main process
    """
    n = np.array(N_THREADS, dtype=float)
    steps = n * EPISODES * MEAN_STEPS
    seconds = steps / np.array([np.median(curve[str(w)]) for w in N_THREADS])
    # Relative errors count
    design = np.column_stack([np.full_like(n, EPISODES * MEAN_STEPS), steps]) / seconds[:, None]
    a, b = np.linalg.lstsq(design, np.ones_like(n), rcond=None)[0]
    return float(a), float(b)


def plot(curve: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    a, b = bounds(curve)
    figure, axes = plt.subplots(figsize=(6, 3.8), constrained_layout=True)
    axes.plot(N_THREADS, [n / SLEEP for n in N_THREADS], ":", color="gray", label="workers x one that only sleeps")
    axes.plot(N_THREADS, [1 / (a / n + b) for n in N_THREADS], "--", color="tab:blue", label="the formula")
    axes.plot(N_THREADS, [np.median(curve[str(n)]) for n in N_THREADS], "o", color="tab:blue", label="learn()")
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="transitions a second")
    axes.set_xticks(N_THREADS, labels=[str(n) for n in N_THREADS])
    axes.set_title(f"Steps that sleep {SLEEP * 1000:.0f} ms, {EPISODES} episodes a batch and worker")
    axes.minorticks_off()
    axes.legend()
    figure.savefig(IMAGES / "workers.png", dpi=100)


def table(result: dict[str, Any]) -> str:
    rates = {name: float(np.median(values)) for name, values in result["rates"].items()}
    one, two = rates["lander, 1 worker"], rates["lander, 2 workers"]
    alone = rates["lander, environment alone"]
    pool = rates["EnvPool alone"]
    rows = [
        ("lander: 2 workers, times 1 worker", "at least 1.7", f"{two / one:.2f}"),
        (
            "an environment that sleeps: 2 workers, times 1 worker",
            "at least 1.9",
            f"{rates['sleeper, 2 workers'] / rates['sleeper, 1 worker']:.2f}",
        ),
        ("what a batch of 4,000 adds, milliseconds", "at most 15", f"{np.median(result['added']) * 1000:.1f}"),
        ("lander: 2 workers, times A2C on `SubprocVecEnv(2)`", "at least 5", f"{two / rates['lander, A2C']:.1f}"),
        ("lander: 1 worker, share of the environment alone", "at least 0.65", f"{one / alone:.2f}"),
        ("lander: no workers, share of the environment alone", "at least 0.65", f"{rates['lander, no workers'] / alone:.2f}"),
        ("lander: steps thrown away with 2 workers", "", f"{np.median(result['discarded']):.1%}"),
        (f"EnvPool, {MEMBERS} members: REINFORCE, share of the pool alone", "at least 0.6", f"{rates['EnvPool'] / pool:.2f}"),
        (
            f"EnvPool, {MEMBERS} members: REINFORCE, times no workers",
            "",
            f"{rates['EnvPool'] / rates['lander, no workers']:.2f}",
        ),
    ]
    lines = ["| what | aim | measured |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    lines.append(f"\nThe environment alone makes {alone:,.0f} steps a second here, EnvPool's {pool:,.0f} on one thread.")
    return "\n".join(lines)


def paper(curve: dict[str, list[float]]) -> str:
    """What the formula says of more workers than there were."""
    a, b = bounds(curve)
    measured = np.median(curve["64"])
    lines = [
        f"A step takes {a * 1000:.2f} ms in a worker, of which {SLEEP * 1000:.0f} ms are sleep, and a transition "
        f"{b * 1e6:.0f} µs in the process that all threads share: acting, merging, callbacks and the update.",
        f"With 64 workers the formula says {1 / (a / 64 + b):,.0f} transitions a second, and {measured:,.0f} were measured. "
        f"With 1,000 it says {1 / (a / 1000 + b):,.0f}, {a / (a / 1000 + b):.0f} times one worker: more than {a / b:.0f} "
        "workers wait for the main process longer than it waits for them.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60_000, help="of a run on the lander")
    arguments = parser.parse_args()
    th.set_num_threads(1)
    measures: dict[str, Any] = {
        "lander, no workers": partial(lander_rate, None, arguments.steps),
        "lander, 1 worker": partial(lander_rate, 1, arguments.steps),
        "lander, 2 workers": partial(lander_rate, 2, arguments.steps),
        "lander, A2C": partial(a2c_rate, arguments.steps // 4),
        "lander, environment alone": partial(environment_alone(LANDER), arguments.steps // 2),
        "EnvPool alone": partial(pool_rate, arguments.steps),
        "EnvPool": partial(pool_learn_rate, 2 * arguments.steps),
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
            print(f"{name}: {rate:,.0f} transitions a second", flush=True)
        result["added"] += added_seconds(10)
        for n_threads in N_THREADS:
            with ThreadPoolExecutor(n_threads) as executor:
                rate = sleeper_rate(executor, EPISODES * n_threads)
            result["curve"].setdefault(str(n_threads), []).append(rate)
            print(f"sleeping, {n_threads} workers: {rate:,.0f} transitions a second", flush=True)
    write_json(RESULTS / "workers.json", result)
    plot(result["curve"])
    fill(SCALING, "workers", table(result))
    fill(SCALING, "paper", paper(result["curve"]))
    print(table(result), paper(result["curve"]), sep="\n\n")


if __name__ == "__main__":
    main()
