"""
Does a long training keep its memory, files and processes?

    python -m benchmarks.soak --minutes 30

Trains on LunarLanderContinuous-v3 as `examples/lunar_lander.py` does, with all that writes files: `Monitor`, TensorBoard,
checkpoints and evaluations, in a temporary folder. Looks at the process every ten seconds, and compares the minute after the
first five with the last one. Writes ``results/soak.json``, fills docs/benchmarks.md, says whether it holds, and exits with 1
if not. ``--page`` fills the page again from the result that is there.

Box2D's Python bindings lose memory whenever fixtures are made, as each reset of the lander does. How much is measured before
training, on the environment alone, and taken off for every reset. (SB3's ``Monitor`` keeps three numbers an episode, and
``EvalCallback`` three an evaluation and episode: some hundred bytes an episode are expected to stay.)
"""

import argparse
import ctypes
import gc
import json
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

from benchmarks.common import PAGE, RESULTS, fill, provenance, write_json
from benchmarks.throughput import LANDER
from sb3_reinforce import REINFORCE, AtomicCheckpointCallback

try:
    psutil: Any = import_module("psutil")
except ImportError:
    psutil = None

RESULT = RESULTS / "soak.json"
#: Relative difference of the resident memory that is none
TOLERANCE = 0.02
#: What must not grow at all
COUNTS = ("open_files", "processes", "threads")


@dataclass(frozen=True)
class Sample:
    """
    A look at the process.

    :param seconds: since training began
    :param steps: taken until then
    :param memory: resident, bytes
    :param allocated: what the C library has handed out of it and not got back, bytes (0 where it does not tell)
    :param resets: of environments, until then
    :param open_files: file descriptors
    :param processes: children
    :param threads: of this process
    :param blocks: of memory that Python has allocated for its objects
    :param log_size: of the folder that training writes to, bytes
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
    """Counts the resets of all of its kind."""

    n = 0

    def reset(self, **kwargs: Any) -> Any:
        CountedResets.n += 1
        return super().reset(**kwargs)


class Mallinfo2(ctypes.Structure):
    """What ``mallinfo2()`` of glibc returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated() -> int:
    """
    Give what is free back to the system: how much of it is kept changes from moment to moment by more than what is looked for.

    :return: bytes that the C library has handed out and not got back, 0 where it is not glibc
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
        # The folder itself is open while it is read
        n_files = len(list((proc / "fd").iterdir())) - 1
        tasks = list((proc / "task").iterdir())
        n_processes, n_threads = sum(len((task / "children").read_text().split()) for task in tasks), len(tasks)
    log_size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    counts = n_files, n_processes, n_threads, sys.getallocatedblocks()
    return Sample(seconds, steps, memory, n_allocated, CountedResets.n, *counts, log_size)


class Looks(BaseCallback):
    """Looks at the process now and then, and ends training when the time is over."""

    def __init__(self, folder: Path, minutes: float, every: float):
        super().__init__()
        self.folder = folder
        self.end = 60 * minutes
        self.every = every
        self.samples: list[Sample] = []

    def _on_training_start(self) -> None:
        self.started = time.monotonic()
        self.due = self.every

    def _on_step(self) -> bool:
        seconds = time.monotonic() - self.started
        if seconds >= self.due:
            # From now on: an evaluation may have taken longer than this
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
        return seconds < self.end


def lost_in_a_reset(n_resets: int = 5000) -> float:
    """Bytes that a reset of the environment alone takes and does not give back."""
    env = CountedResets(gym.make(LANDER))
    samples = []
    # What it takes at first, it may use again
    for n in (1000, n_resets):
        for _ in range(n):
            env.reset()
        samples.append(look(0.0, 0, Path(os.devnull)))
    before, after = samples
    grown = (after.allocated - before.allocated) if after.allocated else (after.memory - before.memory)
    return grown / n_resets


def judge(samples: list[Sample], settled: float, window: float, lost: float) -> tuple[dict[str, Any], list[str]]:
    """
    Compare the process when it has settled with the process at the end.

    :param samples: in the order of their times
    :param settled: seconds after which nothing should grow any more
    :param window: seconds, of which the medians are compared: from then on, and up to the end
    :param lost: bytes that each reset of an environment takes and does not give back
    :return: the figures that were compared, and what does not hold, in words
    :raises ValueError: if there is no sample in a window, or the windows are not apart
    """
    end = samples[-1].seconds if samples else 0.0
    before = [sample for sample in samples if settled <= sample.seconds <= settled + window]
    after = [sample for sample in samples if sample.seconds >= end - window]
    if not before or before[-1].seconds >= after[0].seconds:
        raise ValueError(
            f"{end:.0f} seconds are too few to compare {window:.0f} after the first {settled:.0f} with the last {window:.0f}"
        )
    figures: dict[str, Any] = {}
    for name in ("memory", "allocated", "resets", "blocks", *COUNTS):
        figures[name] = [float(np.median([getattr(sample, name) for sample in part])) for part in (before, after)]
    first, last = figures["memory"]
    figures["lost_in_resets"] = lost * (figures["resets"][1] - figures["resets"][0])
    figures["growth"] = (last - figures["lost_in_resets"]) / first - 1
    wrong = []
    if abs(figures["growth"]) >= TOLERANCE:
        wrong.append(f"resident memory has changed by {figures['growth']:+.1%} without what resets have lost")
    for name in COUNTS:
        first, last = figures[name]
        if last > first:
            wrong.append(f"{name.replace('_', ' ')} went from {first:.0f} to {last:.0f}")
    return figures, wrong


def train(folder: Path, minutes: float, every: float) -> list[Sample]:
    # As in examples/lunar_lander.py
    env_kwargs = dict(render_mode=None, max_episode_steps=400)
    env = make_vec_env(LANDER, 8, env_kwargs=env_kwargs, monitor_dir=str(folder), wrapper_class=CountedResets)
    model = REINFORCE("MlpPolicy", env, n_steps=125, tensorboard_log=str(folder / "tensorboard"), seed=0, device="cpu")
    evaluations = EvalCallback(
        make_vec_env(LANDER, 10, env_kwargs=dict(render_mode=None), wrapper_class=CountedResets),
        n_eval_episodes=10,
        eval_freq=2500,
        log_path=str(folder),
        best_model_save_path=str(folder),
        verbose=0,
    )
    looks = Looks(folder, minutes, every)
    checkpoints = AtomicCheckpointCallback(folder / "checkpoints", every_n_updates=20)
    model.learn(10**12, callback=[evaluations, looks, checkpoints])
    return looks.samples


def summary(result: dict[str, Any]) -> str:
    """What a page says of a result."""
    figures, last = result["figures"], result["samples"][-1]
    before, after = (number / 2**20 for number in figures["memory"])
    counts = "; ".join(f"{name.replace('_', ' ')}: {a:.0f}, then {b:.0f}" for name in COUNTS for a, b in [figures[name]])
    return (
        f"{last['steps']:,} steps on {LANDER} in {last['seconds'] / 60:.0f} minutes. Resident memory is {before:.1f} MiB "
        f"after {result['settled'] / 60:.0f} minutes and {after:.1f} MiB at the end. Resets of the environment alone lose "
        f"{figures['lost_in_resets'] / 2**20:.1f} MiB of that: {figures['growth']:+.2%} without these. {counts.capitalize()}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two looks")
    parser.add_argument("--page", action="store_true", help="fill docs/benchmarks.md from the result that is there")
    arguments = parser.parse_args()
    if arguments.page:
        return fill(PAGE, "soak", summary(json.loads(RESULT.read_text())))
    if not (arguments.minutes > 0 and arguments.every > 0):
        parser.error("--minutes and --every must be above 0")
    th.set_num_threads(1)
    lost = lost_in_a_reset()
    print(f"A reset of the environment alone loses {lost:,.0f} bytes", flush=True)
    settled = min(300.0, 20 * arguments.minutes)
    with tempfile.TemporaryDirectory() as folder:
        samples = train(Path(folder), arguments.minutes, arguments.every)
    figures, wrong = judge(samples, settled, min(60.0, settled), lost)
    result = dict(settled=settled, lost_in_a_reset=lost, figures=figures, wrong=wrong)
    write_json(RESULT, dict(provenance(), **result, samples=[asdict(sample) for sample in samples]))
    print(summary(json.loads(RESULT.read_text())))
    fill(PAGE, "soak", summary(json.loads(RESULT.read_text())))
    if wrong:
        print(f"It does not hold: {'; '.join(wrong)}")
        raise SystemExit(1)
    print("It holds: memory, open files, processes and threads do not grow")


if __name__ == "__main__":
    main()
