"""
Train four algorithms on twelve tasks, each with the defaults of its constructor, and write one JSON file per run,
``results/league/ENV/ALGORITHM/seed_K.json``.

    python -m benchmarks.league --seeds 9000-9004
    python -m benchmarks.league --env Taxi-v4 --algo reinforce ppo

REINFORCE, SB3's A2C and PPO, and sb3-contrib's TRPO take turns, seed by seed, on one environment, created from its id, for the
same number of steps; missing runs can be made on another day. Then, the final policy is evaluated over 100 deterministic
episodes of other environments. Existing runs are skipped. ``benchmarks.league_figures`` makes the table and the figure.
MuJoCo's tasks require ``pip install '.[mujoco]'``.
"""

import argparse
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from benchmarks.common import RESULTS, provenance, run_all, write_json
from benchmarks.learning import EVALUATION_SEED, seeds
from sb3_reinforce import REINFORCE, EpisodeVecEnv

FOLDER = RESULTS / "league"
ALGORITHMS: dict[str, Any] = {"reinforce": REINFORCE, "a2c": A2C, "ppo": PPO, "trpo": TRPO}
#: Number of training steps on each task
TASKS = {
    "CartPole-v1": 50_000,
    "Acrobot-v1": 100_000,
    "MountainCarContinuous-v0": 100_000,
    "FrozenLake-v1": 100_000,
    "Blackjack-v1": 100_000,
    "Pendulum-v1": 200_000,
    "LunarLanderContinuous-v3": 300_000,
    "LunarLander-v3": 300_000,
    "Taxi-v4": 300_000,
    "Reacher-v5": 300_000,
    "Hopper-v5": 1_000_000,
    "HalfCheetah-v5": 1_000_000,
}


def make_env(env_id: str) -> gym.Env:
    """Create an environment from its id. SB3 has no tuples of observations, as in Blackjack-v1."""
    env = gym.make(env_id)
    return gym.wrappers.FlattenObservation(env) if isinstance(env.observation_space, gym.spaces.Tuple) else env


def run(algo: str, env_id: str, seed: int) -> None:
    """Train and evaluate one algorithm on one task."""
    th.set_num_threads(1)
    model = ALGORITHMS[algo]("MlpPolicy", make_env(env_id), seed=seed, device="cpu")
    started, cpu_started = time.perf_counter(), time.process_time()
    model.learn(TASKS[env_id])
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    env = make_vec_env(lambda: make_env(env_id), 10, EVALUATION_SEED, vec_env_cls=EpisodeVecEnv)
    returns, _ = evaluate_policy(model, env, 100, return_episode_rewards=True)
    went = dict(
        env=env_id,
        algo=algo,
        seed=seed,
        timesteps=model.num_timesteps,
        seconds=round(seconds, 1),
        cpu_seconds=round(cpu_seconds, 1),
        final_returns=[round(float(value), 3) for value in returns],  # type: ignore[union-attr]
    )
    write_json(FOLDER / env_id / algo / f"seed_{seed}.json", provenance("sb3_contrib") | went)
    print(f"{env_id} {algo} seed {seed}: {np.mean(returns):.2f} in {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--algo", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    parser.add_argument("--seeds", type=seeds, default="9000-9004", help="none of these was used for tuning")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel processes, with one thread each")
    arguments = parser.parse_args()
    missing = [
        (algo, env_id, seed)
        for seed in arguments.seeds
        for env_id in arguments.env
        for algo in arguments.algo
        if not (FOLDER / env_id / algo / f"seed_{seed}.json").exists()
    ]
    run_all(run, missing, arguments.jobs)


if __name__ == "__main__":
    main()
