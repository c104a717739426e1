"""
Provoke the symptoms of docs/why.md on small tasks, and cure them.

    python -m benchmarks.why                    # existing runs are skipped
    python -m benchmarks.why --runs pendulum --seeds 9500
    python -m benchmarks.why_figures            # generate the figures and tables of docs/why.md

``PAIRS`` has a run that fails and a run that is cured for each symptom, with the same number of steps. The deterministic
policy is evaluated over 100 episodes of the task itself, without shaped rewards.

Write one JSON file per run, ``results/why/RUN/seed_K.json``: the log of each update and the training episodes, both thinned.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger

from benchmarks.common import RESULTS, provenance, run_all, write_json
from benchmarks.learning import EVALUATION_SEED, evaluate, seeds
from sb3_reinforce import REINFORCE, EpisodeVecEnv

FOLDER = RESULTS / "why"
#: Maximum number of updates and of episodes in a file
MAX_POINTS = 150
#: Log keys in a file
ROLLOUT_KEYS = ("ep_rew_mean", "ep_len_mean", "episodes")
TRAIN_KEYS = ("gradient_signal", "cg_damping", "std", "explained_variance", "advantage_std", "entropy_loss")
KEYS = [f"rollout/{key}" for key in ROLLOUT_KEYS] + [f"train/{key}" for key in TRAIN_KEYS]


class Shaped(gym.Wrapper):
    """Add ``gamma * potential(new state) - potential(old state)`` to the rewards (Ng et al., 1999)."""

    def potential(self) -> float:
        raise NotImplementedError

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        result = self.env.reset(**kwargs)
        self.before = self.potential()
        return result

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        before, self.before = self.before, self.potential()
        return observation, float(reward) + 0.99 * self.before - before, terminated, truncated, info


class Energy(Shaped):
    """MountainCar-v0 with its mechanical energy as potential, up to about 100 on the hill."""

    def potential(self) -> float:
        position, velocity = self.get_wrapper_attr("state")
        return 20_000 * float(0.0025 * np.sin(3 * position) + velocity**2 / 2)


class Progress(Shaped):
    """FrozenLake-v1 (8x8) with the progress to the goal as potential, up to 5."""

    def potential(self) -> float:
        return 5 * sum(divmod(int(self.get_wrapper_attr("s")), 8)) / 14


class Run(NamedTuple):
    """Environment, number of steps, non-default arguments, and changes of the environment during training."""

    env_id: str
    timesteps: int
    kwargs: dict[str, Any] = {}  # noqa: RUF012
    wrapper: Callable[[gym.Env], gym.Env] | None = None
    env_kwargs: dict[str, Any] = {}  # noqa: RUF012

    def make(self) -> gym.Env:
        env = gym.make(self.env_id, **self.env_kwargs)
        return env if self.wrapper is None else self.wrapper(env)

    @property
    def settings(self) -> str:
        parts = [f"{name}={value!r}" for name, value in self.kwargs.items()]
        return ", ".join(parts + ["shaped reward"] * (self.wrapper is not None)) or "defaults"


#: Holes cost 1, and waiting is free
LAKE = dict(map_name="8x8", is_slippery=False, reward_schedule=(1, -1, 0))
RUNS = {
    "pendulum": Run("Pendulum-v1", 50_000),
    "pendulum-no-baseline": Run("Pendulum-v1", 50_000, dict(baseline=None)),
    "pendulum-plain": Run("Pendulum-v1", 50_000, dict(cg_damping=10.0)),
    "pendulum-no-time": Run("Pendulum-v1", 50_000, dict(baseline_kwargs=dict(time=False))),
    "pendulum-one-episode": Run("Pendulum-v1", 50_000, dict(n_episodes=1, n_steps=200)),
    "lake": Run("FrozenLake-v1", 40_000, env_kwargs=LAKE),
    "lake-shaped": Run("FrozenLake-v1", 40_000, {}, Progress, LAKE),
    "car": Run("MountainCar-v0", 30_000),
    "car-shaped": Run("MountainCar-v0", 30_000, {}, Energy),
}
#: Run that fails and run that is cured, by symptom
PAIRS = {
    "noise": ("pendulum-no-baseline", "pendulum"),
    "std": ("pendulum-plain", "pendulum"),
    "baseline": ("pendulum-no-time", "pendulum"),
    "time": ("lake", "lake-shaped"),
    "few": ("pendulum-one-episode", "pendulum"),
    "rare": ("car", "car-shaped"),
}


class Log(KVWriter):
    """Keep the logged values of each update."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.rows.append(key_values | {"steps": step})


class Episodes(BaseCallback):
    """Keep the return and the length of each training episode."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[float, int]] = []

    def _on_step(self) -> bool:
        self.found += [(info["episode"]["r"], info["episode"]["l"]) for info in self.locals["infos"] if "episode" in info]
        return True


def thin(values: list[Any]) -> list[Any]:
    """Keep every n-th of the values and the last one."""
    kept = np.unique(np.linspace(0, len(values) - 1, MAX_POINTS).round().astype(int))
    return [values[position] for position in kept]


def run(name: str, seed: int, timesteps: int | None) -> None:
    th.set_num_threads(1)
    what = RUNS[name]
    model = REINFORCE("MlpPolicy", what.make, seed=seed, device="cpu", **what.kwargs)
    log, episodes = Log(), Episodes()
    model.set_logger(Logger(None, [log]))
    model.learn(timesteps or what.timesteps, callback=episodes)
    rows, steps = thin(log.rows), np.cumsum([length for _, length in episodes.found]).tolist()
    env = make_vec_env(what.env_id, 10, EVALUATION_SEED, env_kwargs=what.env_kwargs, vec_env_cls=EpisodeVecEnv)
    final = evaluate(model, env, 100)
    logged = {
        key: [[row["steps"], float(f"{row[key]:.4g}")] for row in rows if np.isfinite(row.get(key, np.nan))] for key in KEYS
    }
    content = dict(
        provenance(),
        run=name,
        env=what.env_id,
        seed=seed,
        settings=what.settings,
        timesteps=model.num_timesteps,
        updates=model._n_updates,
        log={key: points for key, points in logged.items() if points},
        episodes=[[step, round(r, 2), length] for step, (r, length) in thin(list(zip(steps, episodes.found, strict=True)))],
        final_return=round(float(np.mean(final)), 2),
    )
    write_json(FOLDER / name / f"seed_{seed}.json", content)
    print(f"{name} seed {seed}: {content['final_return']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", type=seeds, default="9500-9502")
    parser.add_argument("--timesteps", type=int, help="number of training steps (default: from the run)")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel processes, with one thread each")
    arguments = parser.parse_args()
    names = [(name, seed) for seed in arguments.seeds for name in arguments.runs]
    missing = [(*job, arguments.timesteps) for job in names if not (FOLDER / job[0] / f"seed_{job[1]}.json").exists()]
    run_all(run, missing, arguments.jobs)


if __name__ == "__main__":
    main()
