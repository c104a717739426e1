"""
Measure the speed of `learn()` with one and two threads, in turn, on LunarLanderContinuous-v3.

    python -m benchmarks.threads

Each number of threads has its own process, because libraries read ``OMP_NUM_THREADS`` and the like once. The processes take
short turns, so that other processes on the machine slow down both. Write ``results/threads.json`` and a block of
``docs/scaling.md``.
"""

import os
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import numpy as np

from benchmarks import THREADS
from benchmarks.common import RESULTS, SCALING, fill, provenance, write_json

N_PAIRS = 15
CODE = """
import sys
from benchmarks.scaling import measure
measure()
for _ in sys.stdin:
    print(measure()["steps_per_second"], flush=True)
"""


def start(n_threads: str) -> subprocess.Popen[str]:
    environment, pipe = os.environ | dict.fromkeys(THREADS, n_threads), subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", CODE], env=environment, stdin=pipe, stdout=pipe, text=True)


def measure(process: subprocess.Popen[str]) -> float:
    """Return the steps per second of the next run of a process."""
    print(file=process.stdin, flush=True)
    return float(process.stdout.readline())  # type: ignore[union-attr]


def text(result: dict[str, Any]) -> str:
    """Summarize the ratios of the pairs: other processes on the machine change both speeds of a pair."""
    ratios = np.divide(result["steps_per_second"]["2"], result["steps_per_second"]["1"])
    low, high = np.quantile(ratios, [0.25, 0.75])
    return (
        f"On `LunarLanderContinuous-v3`, `learn()` with two threads runs at {np.median(ratios):.2f} times the speed of one "
        f"thread\n(median of {len(ratios)} pairs of runs, quartiles {low:.2f} and {high:.2f}; "
        f"{result['n_cores']} cores, load average {result['load_average']:.1f} at the start)."
    )


def main() -> None:
    started, load = datetime.now(UTC).isoformat(timespec="seconds"), os.getloadavg()[0]
    rates: dict[str, list[float]] = {"1": [], "2": []}
    processes = {n_threads: start(n_threads) for n_threads in rates}
    for _ in range(N_PAIRS):
        for n_threads, process in processes.items():
            rates[n_threads].append(measure(process))
            print(f"{n_threads} threads: {rates[n_threads][-1]:,.0f} steps/s", flush=True)
    for process in processes.values():
        process.communicate()
    result = dict(provenance(), started=started, load_average=load, n_cores=os.cpu_count(), steps_per_second=rates)
    write_json(RESULTS / "threads.json", result)
    fill(SCALING, "threads", text(result))


if __name__ == "__main__":
    main()
