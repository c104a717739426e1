"""
Check that a long training run does not leak memory, open files, processes or threads.

    python -m benchmarks.soak --minutes 15
    python -m benchmarks.soak --task CartPole-v1 --steps 30000000 --minutes 100 --every 20

Train on one of the tasks like `examples/lunar_lander.py`, with everything that writes files: `Monitor`, TensorBoard,
checkpoints and evaluations, in a temporary folder. Sample the process every ten seconds, and compare a minute after a warm-up
of five minutes (a third of a run of less than 15) with the last minute. Write ``results/soak/TASK.json``, update
docs/benchmarks.md, and exit with 1 if there is a leak. ``--page`` only updates the page, from the existing results.

Box2D's Python bindings leak memory in every reset of the lander, and SB3's ``Monitor`` keeps three numbers per episode. Both
are measured on the environment alone and subtracted. ``EvalCallback`` keeps its results, too.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor

from benchmarks.common import PAGE, RESULTS, fill, provenance, write_json
from benchmarks.throughput import IMAGE_ENV, LANDER, RandomImages
from sb3_reinforce import REINFORCE, AtomicCheckpointCallback

try:
    psutil: Any = import_module("psutil")
except ImportError:
    psutil = None

FOLDER = RESULTS / "soak"
#: Name of the result -> policy, environment, and its arguments
TASKS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    LANDER: ("MlpPolicy", LANDER, dict(render_mode=None, max_episode_steps=400)),
    "CartPole-v1": ("MlpPolicy", "CartPole-v1", dict(render_mode=None)),
    "images": ("CnnPolicy", RandomImages, {}),
}
#: Tolerated relative change of the resident memory
TOLERANCE = 0.02
#: Counts that must not grow at all
COUNTS = ("open_files", "processes", "threads")


@dataclass(frozen=True)
class Sample:
    """
    Resources of the process at one point in time.

    :param seconds: time since the start of training
    :param steps: number of training steps
    :param memory: resident memory in bytes
    :param allocated: memory allocated by the C library in bytes, 0 if unknown
    :param resets: number of environment resets
    :param open_files: number of file descriptors
    :param processes: number of child processes
    :param threads: number of threads
    :param blocks: number of memory blocks allocated by Python
    :param log_size: size of the log folder in bytes
    """

    seconds: float
    steps: int
    memory: int
    allocated: int
    resets: int
    open_files: int
    processes: int
    threads: int
    blocks: int
    log_size: int


class CountedResets(gym.Wrapper):
    """Count the resets of all wrapped environments."""

    n = 0

    def reset(self, **kwargs: Any) -> Any:
        CountedResets.n += 1
        return super().reset(**kwargs)


class Mallinfo2(ctypes.Structure):
    """Return type of glibc's ``mallinfo2()``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated() -> int:
    """
    Measure the allocated memory, after returning free memory to the system (otherwise, its fluctuations hide small leaks).

    :return: bytes allocated by the C library, 0 if it is not glibc
    """
    gc.collect()
    try:
        library = ctypes.CDLL(None)
        library.malloc_trim(0)
        library.mallinfo2.restype = Mallinfo2
    except (AttributeError, TypeError):
        return 0
    info = library.mallinfo2()
    return info.uordblks + info.hblkhd


def look(seconds: float, steps: int, folder: Path) -> Sample:
    n_allocated = allocated()
    if psutil is not None:
        process = psutil.Process()
        memory, n_files = process.memory_info().rss, process.num_fds()
        n_processes, n_threads = len(process.children(recursive=True)), process.num_threads()
    else:
        proc = Path("/proc/self")
        memory = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        # Without the descriptor of the folder being read
        n_files = len(list((proc / "fd").iterdir())) - 1
        tasks = list((proc / "task").iterdir())
        n_processes, n_threads = sum(len((task / "children").read_text().split()) for task in tasks), len(tasks)
    log_size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    counts = n_files, n_processes, n_threads, sys.getallocatedblocks()
    return Sample(seconds, steps, memory, n_allocated, CountedResets.n, *counts, log_size)


class Looks(BaseCallback):
    """Sample the process at regular intervals, and stop training when the time is over or the steps are done."""

    def __init__(self, folder: Path, minutes: float, every: float, steps: float = math.inf):
        super().__init__()
        self.folder = folder
        self.end, self.last_step = 60 * minutes, steps
        self.every = every
        self.samples: list[Sample] = []

    def _on_training_start(self) -> None:
        self.started = time.monotonic()
        self.due = self.every

    def _on_step(self) -> bool:
        seconds = time.monotonic() - self.started
        if seconds >= self.due:
            # Relative to now, because an evaluation can take longer than the interval
            self.due = seconds + self.every
            self.samples.append(look(seconds, self.num_timesteps, self.folder))
            latest = self.samples[-1]
            print(
                f"{seconds:6.0f} s  {latest.steps:11,} steps  {latest.memory / 2**20:7.1f} MiB resident  "
                f"{latest.allocated / 2**20:7.1f} MiB allocated  {latest.resets:,} resets  {latest.open_files} files  "
                f"{latest.processes} processes  {latest.threads} threads  {latest.blocks:,} blocks  "
                f"logs {latest.log_size / 2**20:.1f} MiB",
                flush=True,
            )
        return seconds < self.end and self.num_timesteps < self.last_step


def lost_in_an_episode(task: str) -> float:
    """Measure how many bytes an episode of the environment alone keeps: leaks of ``reset()``, and numbers of ``Monitor``."""
    _, make, kwargs = TASKS[task]
    env = Monitor(CountedResets(make(**kwargs) if callable(make) else gym.make(make, **kwargs)))
    env.action_space.seed(0)
    samples = []
    # Warm up: memory of the first episodes can be reused
    for n_steps in (50_000, 400_000):
        env.reset()
        for _ in range(n_steps):
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            if terminated or truncated:
                env.reset()
        samples.append(look(0.0, 0, Path(os.devnull)))
    before, after = samples
    return (after.memory - before.memory) / (after.resets - before.resets)


def judge(samples: list[Sample], settled: float, window: float, lost: float) -> tuple[dict[str, Any], list[str]]:
    """
    Compare the process after the warm-up with the process at the end.

    :param samples: samples in chronological order
    :param settled: warm-up time in seconds. The first window begins with the first sample after it
    :param window: length in seconds of the two windows whose medians are compared
    :param lost: bytes kept by each episode of the environment alone
    :return: compared figures, and a description of each leak
    :raises ValueError: if a window has no samples, or the windows overlap
    """
    end = samples[-1].seconds if samples else 0.0
    start = min((sample.seconds for sample in samples if sample.seconds >= settled), default=end)
    before = [sample for sample in samples if start <= sample.seconds <= start + window]
    after = [sample for sample in samples if sample.seconds >= end - window]
    if not before or before[-1].seconds >= after[0].seconds:
        raise ValueError(
            f"{end:.0f} seconds are too short to compare the {window:.0f} seconds after the first {settled:.0f} with the last "
            f"{window:.0f}"
        )
    figures: dict[str, Any] = dict(start=start)
    for name in ("memory", "allocated", "resets", "blocks", *COUNTS):
        figures[name] = [float(np.median([getattr(sample, name) for sample in part])) for part in (before, after)]
    first, last = figures["memory"]
    figures["lost_in_episodes"] = lost * (figures["resets"][1] - figures["resets"][0])
    figures["growth"] = (last - figures["lost_in_episodes"]) / first - 1
    wrong = []
    if abs(figures["growth"]) >= TOLERANCE:
        wrong.append(f"resident memory changed by {figures['growth']:+.1%}, excluding what episodes of the environment keep")
    for name in COUNTS:
        first, last = figures[name]
        if last > first:
            wrong.append(f"{name.replace('_', ' ')} grew from {first:.0f} to {last:.0f}")
    return figures, wrong


def train(task: str, folder: Path, minutes: float, every: float, steps: float = math.inf) -> list[Sample]:
    # As in examples/lunar_lander.py
    policy, env_id, kwargs = TASKS[task]
    env = make_vec_env(env_id, 8, env_kwargs=kwargs, monitor_dir=str(folder), wrapper_class=CountedResets)
    model = REINFORCE(policy, env, n_steps=125, tensorboard_log=str(folder / "tensorboard"), seed=0, device="cpu")
    evaluations = EvalCallback(
        make_vec_env(env_id, 10, env_kwargs=kwargs, wrapper_class=CountedResets),
        n_eval_episodes=10,
        eval_freq=2500,
        log_path=str(folder),
        best_model_save_path=str(folder),
        verbose=0,
    )
    looks = Looks(folder, minutes, every, steps)
    checkpoints = AtomicCheckpointCallback(folder / "checkpoints", every_n_updates=20)
    model.learn(10**12, callback=[evaluations, looks, checkpoints])
    return looks.samples


def summary() -> str:
    """Summarize the results for docs/benchmarks.md."""
    lines = []
    for task in TASKS:
        if not (path := FOLDER / f"{task}.json").exists():
            continue
        result = json.loads(path.read_text())
        figures, last = result["figures"], result["samples"][-1]
        before, after = (number / 2**20 for number in figures["memory"])
        counts = "; ".join(f"{name.replace('_', ' ')}: {a:.0f}, then {b:.0f}" for name in COUNTS for a, b in [figures[name]])
        lines.append(
            f"- {IMAGE_ENV if task == 'images' else task}: {last['steps']:,} steps in {last['seconds'] / 60:.0f} minutes. "
            f"Resident memory is {before:.1f} MiB after {figures['start'] / 60:.0f} minutes and {after:.1f} MiB at the end. "
            f"Episodes of the environment alone keep {figures['lost_in_episodes'] / 2**20:.1f} MiB; without these, the change "
            f"is {figures['growth']:+.2%}. {counts.capitalize()}."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default=LANDER)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=float, default=math.inf, help="number of steps after which training ends")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between samples")
    parser.add_argument("--page", action="store_true", help="only update docs/benchmarks.md, from the existing results")
    arguments = parser.parse_args()
    if arguments.page:
        return fill(PAGE, "soak", summary())
    if not (arguments.minutes > 0 and arguments.every > 0):
        parser.error("--minutes and --every must be positive")
    th.set_num_threads(1)
    lost = lost_in_an_episode(arguments.task)
    print(f"An episode of the environment alone keeps {lost:,.0f} bytes", flush=True)
    settled = min(300.0, 20 * arguments.minutes)
    with tempfile.TemporaryDirectory() as folder:
        samples = train(arguments.task, Path(folder), arguments.minutes, arguments.every, arguments.steps)
    figures, wrong = judge(samples, settled, min(60.0, settled), lost)
    result = dict(settled=settled, lost_in_an_episode=lost, figures=figures, wrong=wrong)
    path = FOLDER / f"{arguments.task}.json"
    write_json(path, dict(provenance(), **result, samples=[asdict(sample) for sample in samples]))
    fill(PAGE, "soak", summary())
    print(summary())
    if wrong:
        print(f"Leak detected: {'; '.join(wrong)}")
        raise SystemExit(1)
    print("No leak: memory, open files, processes and threads do not grow")


if __name__ == "__main__":
    main()
