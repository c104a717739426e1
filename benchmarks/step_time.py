"""
Measure where the time of one environment step is spent, and plot it as a stacked bar for REINFORCE and A2C.

    python -m benchmarks.step_time

Wrap a clock around each part of `learn()`. A clock excludes the parts that it encloses, so that all parts add up to the time
of the step. Write ``results/step_time.json`` and ``docs/images/step_time.png``.
"""

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch as th
from stable_baselines3 import A2C

from benchmarks.common import IMAGES, RESULTS, provenance, write_json
from benchmarks.throughput import LANDER, Nothing, make_model, vec_env
from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes.acting import Actor

N_STEPS = 12_000
REPEATS = 5
#: Parts of a step in the order of the bar. The rollout loop is the remaining time
PARTS = ("environment", "wrappers and Monitor", "VecEnv", "acting", "callbacks", "buffer", "update", "rollout loop")


class Clocks:
    """Measure the seconds spent in functions, by part, excluding clocked functions that they call."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.inner: list[float] = [0.0]

    def wrap(self, owner: Any, method: str, part: str) -> None:
        """Replace a method of an object or a class by its clocked version."""
        function = getattr(owner, method)
        setattr(owner, method, self.clocked(function, part))

    def clocked(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.inner.append(0.0)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - started
                self.seconds[part] += seconds - self.inner.pop()
                self.inner[-1] += seconds

        return run


def measure(model: Any) -> dict[str, float]:
    """Measure the microseconds of one environment step, by part."""
    clocks, callback = Clocks(), Nothing()
    model.learn(1, callback=callback)
    for env in model.env.envs:
        for method in ("step", "reset"):
            clocks.wrap(env.unwrapped, method, "environment")
            clocks.wrap(env, method, "wrappers and Monitor")
    clocks.wrap(model.env, "step", "VecEnv")
    clocks.wrap(model.rollout_buffer, "add", "buffer")
    for method in ("on_step", "update_locals"):
        clocks.wrap(callback, method, "callbacks")
    clocks.wrap(model, "train", "update")
    if isinstance(model, REINFORCE):
        clocks.wrap(model, "_compute_advantages", "update")
    else:
        clocks.wrap(model.rollout_buffer, "compute_returns_and_advantage", "update")
        clocks.wrap(model.policy, "forward", "acting")
    before = model.num_timesteps
    started = time.perf_counter()
    # Patch the class, because each rollout creates a new actor
    with patch.object(Actor, "__call__", clocks.clocked(Actor.__call__, "acting")):
        model.learn(N_STEPS, callback=callback, reset_num_timesteps=False)
    seconds = time.perf_counter() - started
    clocks.seconds["rollout loop"] = seconds - sum(clocks.seconds.values())
    return {part: 1e6 * value / (model.num_timesteps - before) for part, value in clocks.seconds.items()}


def plot(result: dict[str, dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 3), constrained_layout=True)
    names = list(result)[::-1]
    left = np.zeros(len(names))
    for index, part in enumerate(PARTS):
        width = np.array([result[name][part] for name in names])
        axes.barh(names, width, left=left, label=part, color=plt.get_cmap("tab10")(index))
        left += width
    axes.bar_label(axes.containers[-1], labels=[f"{value:.0f}" for value in left], padding=3)  # type: ignore[arg-type]
    axes.set(xlabel=f"microseconds per step of {LANDER}", xlim=(0, 1.08 * left.max()))
    axes.legend(ncols=4, fontsize="small", loc="lower right")
    figure.savefig(IMAGES / "step_time.png", dpi=100)


def main() -> None:
    th.set_num_threads(1)
    makers: dict[str, Callable[[], Any]] = {
        "REINFORCE": lambda: make_model(REINFORCE, vec_env(LANDER, 1), 3000),
        "REINFORCE, 8 environments": lambda: make_model(REINFORCE, vec_env(LANDER, 8), 375),
        "A2C": lambda: make_model(A2C, vec_env(LANDER, 1), 3000),
        "A2C, 8 environments": lambda: make_model(A2C, vec_env(LANDER, 8), 375),
    }
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in makers}
    for _ in range(REPEATS):
        for name, make in makers.items():
            samples[name].append(measure(make()))
    result = {}
    for name, of_one in samples.items():
        result[name] = {part: float(np.median([sample[part] for sample in of_one])) for part in PARTS}
        print(f"{name}: {sum(result[name].values()):.1f} µs")
        print("  " + ", ".join(f"{part} {microseconds:.1f}" for part, microseconds in result[name].items()))
    write_json(RESULTS / "step_time.json", dict(provenance(), microseconds=samples))
    plot(result)


if __name__ == "__main__":
    main()
