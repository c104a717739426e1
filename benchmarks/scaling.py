"""
Measure how the speed of `learn()` depends on the number of environments, the batch size and the width of the network.

    python -m benchmarks.scaling

Vary one setting at a time on LunarLanderContinuous-v3, starting from batches of 4,096 steps from 4 environments and two hidden
layers of 64 units. Write ``results/scaling.json`` and ``docs/images/scaling.png``.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch as th

from benchmarks.common import IMAGES, RESULTS, provenance, write_json
from benchmarks.throughput import LANDER, environment_alone, make_model, vec_env
from sb3_reinforce import REINFORCE

AXES = {
    "environments": [1, 2, 4, 8, 16, 32, 64],
    "batch": [1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000],
    "width": [32, 64, 128, 256, 512, 1024],
}


def measure(environments: int = 4, batch: int = 4096, width: int = 64) -> dict[str, float]:
    """Measure the steps per second of one setting, and the share of time spent in updates."""
    policy_kwargs = dict(net_arch=[width, width])
    model = make_model(REINFORCE, vec_env(LANDER, environments), max(1, batch // environments), policy_kwargs=policy_kwargs)
    seconds_of_update = 0.0
    train = model.train

    def clocked() -> None:
        nonlocal seconds_of_update
        started = time.perf_counter()
        train()
        seconds_of_update += time.perf_counter() - started

    model.train = clocked
    started = time.perf_counter()
    model.learn(max(batch, 10_000))
    seconds = time.perf_counter() - started
    return dict(steps_per_second=model.num_timesteps / seconds, update_share=seconds_of_update / seconds)


def plot(samples: dict[str, dict[str, list[dict[str, float]]]], alone: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True, constrained_layout=True)
    labels = ("number of environments", "transitions per batch", "units per hidden layer")
    for axes, (name, of_one), label in zip(panels, samples.items(), labels, strict=True):
        rates = [np.median([sample["steps_per_second"] for sample in repeats]) for repeats in of_one.values()]
        shares = [np.median([sample["update_share"] for sample in repeats]) for repeats in of_one.values()]
        axes.plot(AXES[name], rates, "o-", color="tab:blue", label="learn()")
        rollouts = np.array(rates) / (1 - np.array(shares))
        axes.plot(AXES[name], rollouts, "--", color="tab:blue", alpha=0.6, label="rollouts only")
        axes.axhline(alone, color="gray", linestyle=":", label="environment alone")
        axes.set(xscale="log", xlabel=label, ylim=(0, None))
    panels[0].set_ylabel("steps per second")
    panels[-1].legend()
    figure.savefig(IMAGES / "scaling.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    th.set_num_threads(1)
    samples: dict[str, Any] = {name: {str(value): [] for value in values} for name, values in AXES.items()}
    run_alone = environment_alone(LANDER)
    alone = []
    for _ in range(arguments.repeats):
        alone.append(run_alone(20_000))
        for name, values in AXES.items():
            for value in values:
                samples[name][str(value)].append(measure(**{name: value}))
                latest = samples[name][str(value)][-1]
                print(
                    f"{name} {value}: {latest['steps_per_second']:,.0f} steps/s, update {latest['update_share']:.1%}",
                    flush=True,
                )
    write_json(RESULTS / "scaling.json", dict(provenance(), environment_alone=alone, measured=samples))
    plot(samples, float(np.median(alone)))


if __name__ == "__main__":
    main()
