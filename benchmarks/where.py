"""
Compare REINFORCE with SB3's A2C and PPO on small tasks that favor different algorithms.

    python -m benchmarks.where                              # existing runs are skipped
    python -m benchmarks.where --tasks catch --seeds 8000
    python -m benchmarks.figures                            # generate the figures and tables of docs/where.md

All algorithms train for the same number of steps. They use their default hyperparameters, except for the ones in ``TASKS``:
recommendations of docs/settings.md, RL Zoo's hyperparameters for CartPole-v1, and rollouts shorter or longer than an episode.
The deterministic policy is evaluated regularly on separate environments, and over more episodes after training. The training
return is the mean return of the last 100 episodes, with sampled actions. Seconds are CPU time without evaluations.

Write one JSON file per run, ``results/where/TASK/ALGORITHM/seed_K.json``.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.common import RESULTS, provenance, run_all, write_json
from benchmarks.learning import EVALUATION_SEED, evaluate, seeds
from sb3_reinforce import REINFORCE, EpisodeVecEnv

FOLDER = RESULTS / "where"


class Delayed(gym.Wrapper):
    """Delay all rewards to the last step of the episode."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.total = 0.0
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.total += float(reward)
        return observation, self.total if terminated or truncated else 0.0, terminated, truncated, info


class Treasure(gym.Env):
    """Grid with three coins and an exit, worth 1 each. The exit ends the episode; the observation has the remaining coins."""

    size = 7
    coins = ((1, 4), (5, 2), (4, 5))
    moves = ((0, 1), (0, -1), (1, 0), (-1, 0))

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 1, (2 * self.size + len(self.coins),), np.float32)
        self.action_space = spaces.Discrete(len(self.moves))

    def observe(self) -> np.ndarray:
        rows, left = np.eye(self.size)[list(self.position)], [coin in self.left for coin in self.coins]
        return np.concatenate([rows.flatten(), left]).astype(np.float32)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        self.position, self.left = (0, 0), set(self.coins)
        return self.observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        moved = np.add(self.position, self.moves[int(action)]).clip(0, self.size - 1)
        self.position = (int(moved[0]), int(moved[1]))
        leaves = self.position == (self.size - 1, self.size - 1)
        reward = float(leaves or self.position in self.left)
        self.left.discard(self.position)
        return self.observe(), reward, leaves, False, {}


class Bandit(gym.Env):
    """Contextual bandit (episodes of one step), with rewards linear in the context plus noise of the same scale."""

    weights = np.random.default_rng(0).normal(0, 8**-0.5, size=(5, 8))

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (8,), np.float32)
        self.action_space = spaces.Discrete(5)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        self.context = self.np_random.normal(size=8).astype(np.float32)
        return self.context.copy(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = self.weights[int(action)] @ self.context + self.np_random.normal()
        return self.context.copy(), float(reward), True, False, {}


class Catch(gym.Env):
    """Images of a falling ball and a paddle that moves by one cell per step. Five balls per episode, worth 1 each."""

    cells, scale, balls = 6, 6, 5

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 255, (self.cells * self.scale, self.cells * self.scale, 1), np.uint8)
        self.action_space = spaces.Discrete(3)

    def observe(self) -> np.ndarray:
        image = np.zeros((self.cells, self.cells, 1), np.uint8)
        image[self.row, self.column] = 255
        image[-1, self.paddle] = 255
        return image.repeat(self.scale, axis=0).repeat(self.scale, axis=1)

    def drop(self) -> None:
        self.row, self.column = 0, int(self.np_random.integers(self.cells))

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        self.paddle, self.left = self.cells // 2, self.balls
        self.drop()
        return self.observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.paddle = min(max(self.paddle + int(action) - 1, 0), self.cells - 1)
        self.row += 1
        if self.row < self.cells - 1:
            return self.observe(), 0.0, False, False, {}
        observation, reward = self.observe(), float(self.column == self.paddle)
        self.left -= 1
        self.drop()
        return observation if self.left == 0 else self.observe(), reward, self.left == 0, False, {}


class Track(gym.Env):
    """Push a mass towards a target that jumps at random. The reward is the proximity to the target, plus noise."""

    jumps = 0.02

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Discrete(3)

    def observe(self) -> np.ndarray:
        return np.array([self.position - self.target, self.velocity], np.float32)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        self.position, self.velocity = 0.0, 0.0
        self.target = self.np_random.uniform(-1, 1)
        return self.observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.np_random.random() < self.jumps:
            self.target = self.np_random.uniform(-1, 1)
        push = 0.02 * (int(action) - 1) + 0.02 * self.np_random.normal()
        self.velocity = 0.9 * self.velocity + push
        self.position = float(np.clip(self.position + self.velocity, -2, 2))
        nearness = max(0.0, 1 - abs(self.position - self.target))
        return self.observe(), nearness + self.np_random.normal(), False, False, {}


def delayed_cartpole() -> gym.Env:
    return Delayed(gym.make("CartPole-v1"))


def delayed_treasure() -> gym.Env:
    return Delayed(TimeLimit(Treasure(), 100))


def track() -> gym.Env:
    return TimeLimit(Track(), 1000)


class Algorithm(NamedTuple):
    """Algorithm, number of environments and non-default arguments."""

    cls: type[BaseAlgorithm]
    n_envs: int = 1
    kwargs: dict[str, Any] = {}  # noqa: RUF012


class Task(NamedTuple):
    """Task and algorithms to compare. The first algorithm is the reference."""

    env: Callable[[], gym.Env]
    timesteps: int
    algorithms: dict[str, Algorithm]
    policy: str = "MlpPolicy"
    #: Number of episodes per evaluation, and of the final evaluation
    n_episodes: int = 10
    n_final: int = 100


#: A long horizon for rewards at the end of an episode, for all algorithms
FAR = dict(gamma=0.999)
#: SB3's default of 2048 steps per rollout, with eight environments
PPO_8 = Algorithm(PPO, 8, dict(n_steps=256, batch_size=256))
TASKS = {
    "delayed-cartpole": Task(
        delayed_cartpole,
        30_000,
        {
            "reinforce": Algorithm(REINFORCE, 1, FAR),
            "a2c": Algorithm(A2C, 8, FAR),
            # RL Zoo's hyperparameters, except for gamma
            "ppo": Algorithm(
                PPO,
                8,
                dict(
                    n_steps=32,
                    batch_size=256,
                    gae_lambda=0.8,
                    n_epochs=20,
                    learning_rate=LinearSchedule(1e-3, 0, 1),
                    clip_range=LinearSchedule(0.2, 0, 1),
                    **FAR,
                ),
            ),
            # Monte-Carlo returns
            "ppo-long": Algorithm(PPO, 4, dict(n_steps=512, batch_size=256, gae_lambda=1.0, **FAR)),
        },
    ),
    "delayed-treasure": Task(
        delayed_treasure,
        50_000,
        {
            "reinforce": Algorithm(REINFORCE, 1, FAR),
            "a2c": Algorithm(A2C, 8, FAR),
            "ppo": Algorithm(PPO, 8, dict(n_steps=32, batch_size=256, **FAR)),
            "ppo-long": Algorithm(PPO, 4, dict(n_steps=512, batch_size=256, gae_lambda=1.0, **FAR)),
        },
    ),
    "bandit": Task(
        Bandit,
        10_000,
        {"reinforce": Algorithm(REINFORCE, 1, dict(n_steps=500)), "a2c": Algorithm(A2C, 8), "ppo": Algorithm(PPO)},
        n_episodes=200,
        n_final=1000,
    ),
    "catch": Task(
        Catch,
        20_000,
        {"reinforce": Algorithm(REINFORCE, 1, dict(n_steps=500)), "a2c": Algorithm(A2C, 8), "ppo": PPO_8},
        policy="CnnPolicy",
    ),
    "track": Task(
        track,
        20_000,
        {
            "reinforce": Algorithm(REINFORCE),
            "reinforce-cut": Algorithm(REINFORCE, 1, dict(n_steps=500, max_episode_steps=200)),
            "a2c": Algorithm(A2C, 8),
            "ppo": PPO_8,
        },
        n_final=20,
    ),
}


class Evaluations(BaseCallback):
    """
    Evaluate the deterministic policy before training and between rollouts, without counting the CPU time.

    :param env: evaluation environments
    :param every: number of steps between evaluations
    :param n_episodes: number of episodes per evaluation
    """

    def __init__(self, env: VecEnv, every: int, n_episodes: int):
        super().__init__()
        self.env, self.every, self.n_episodes = env, every, n_episodes
        self.points: list[dict[str, float]] = []
        self.next = 0
        self.started = time.process_time()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.num_timesteps < self.next:
            return
        stopped = time.process_time()
        # Evaluate on the same episodes each time
        self.env.seed(EVALUATION_SEED)
        mean = float(np.mean(evaluate(self.model, self.env, self.n_episodes)))
        self.points.append(
            dict(steps=self.num_timesteps, seconds=round(stopped - self.started, 2), mean_return=round(mean, 4))
        )
        self.next = (self.num_timesteps // self.every + 1) * self.every
        self.started += time.process_time() - stopped


def make_model(task: Task, algorithm: Algorithm, seed: int) -> BaseAlgorithm:
    env: Any = task.env
    if algorithm.n_envs > 1 or algorithm.cls is not REINFORCE:
        env = make_vec_env(task.env, algorithm.n_envs, seed)
    return partial(algorithm.cls, task.policy, env, seed=seed, device="cpu")(**algorithm.kwargs)


def evaluation_env(task: Task) -> VecEnv:
    """Create ten evaluation environments, which always run the same episodes."""
    return make_vec_env(task.env, 10, EVALUATION_SEED, vec_env_cls=EpisodeVecEnv)


def run(task_name: str, name: str, seed: int, arguments: argparse.Namespace) -> None:
    th.set_num_threads(1)
    task = TASKS[task_name]
    algorithm = task.algorithms[name]
    timesteps = arguments.timesteps or task.timesteps
    model = make_model(task, algorithm, seed)
    evaluations = Evaluations(evaluation_env(task), timesteps // 10, task.n_episodes)
    model.learn(timesteps, callback=evaluations)
    seconds = time.process_time() - evaluations.started
    final = evaluate(model, evaluation_env(task), task.n_final)
    write_json(
        FOLDER / task_name / name / f"seed_{seed}.json",
        dict(
            provenance(),
            task=task_name,
            algo=name,
            seed=seed,
            n_envs=algorithm.n_envs,
            settings=describe(algorithm),
            timesteps=model.num_timesteps,
            seconds=round(seconds, 1),
            evaluations=evaluations.points,
            training_return=round(float(np.mean([info["r"] for info in model.ep_info_buffer or []])), 4),
            final_returns=[round(value, 4) for value in final],
        ),
    )
    print(f"{task_name} {name} seed {seed}: {np.mean(final):.2f} in {seconds:.0f} s", flush=True)


def describe(algorithm: Algorithm) -> str:
    """Format the non-default arguments."""
    parts = [f"{algorithm.n_envs} envs"] if algorithm.n_envs > 1 else []
    parts += [f"{key}={f'lin_{value.start:g}' if callable(value) else value}" for key, value in algorithm.kwargs.items()]
    return ", ".join(parts) or "defaults"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=seeds, default="8000-8004")
    parser.add_argument("--timesteps", type=int, help="number of training steps (default: from the task)")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel processes, with one thread each")
    arguments = parser.parse_args()
    missing = [
        (task, name, seed, arguments)
        for seed in arguments.seeds
        for task in arguments.tasks
        for name in TASKS[task].algorithms
        if not (FOLDER / task / name / f"seed_{seed}.json").exists()
    ]
    run_all(run, missing, arguments.jobs)


if __name__ == "__main__":
    main()
