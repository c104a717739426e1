"""
Train with many seeds and write one JSON file per run, ``results/learning/ENV/NAME/seed_K.json``.

    python -m benchmarks.learning --env LunarLanderContinuous-v3 --seeds 8000-8019 --jobs 2
    python -m benchmarks.learning --env LunarLanderContinuous-v3 --algo reinforce trpo ppo --name race --until 200
    python -m benchmarks.learning --env LunarLanderContinuous-v3 --algo tianshou --timesteps 500000
    python -m benchmarks.learning --env LunarLander-v3 --algo defaults --seeds 8000-8019 --timesteps 1000000

The algorithms are

- ``reinforce`` and the algorithms of RL Zoo, with their hyperparameter files (RL Zoo has no ``-v5`` of the MuJoCo tasks: they
  use the hyperparameters of ``-v4``);
- ``workers`` and ``envpool``: ``reinforce`` with two workers, or trained on 16 EnvPool environments;
- ``defaults``: REINFORCE with the defaults of its constructor, on an environment created from its id;
- ``tianshou``: Tianshou's Reinforce (requires ``make peers``).

The deterministic policy is evaluated regularly on separate environments, with the clock of the run stopped, and over 100
episodes after training. ``--set gamma:0.98`` changes hyperparameters, and ``--pieces 2000`` calls ``learn()`` repeatedly for
2000 steps; use another ``--name`` for such runs. Several algorithms take turns, seed by seed, for comparable timings. Existing
runs are skipped.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization, unwrap_vec_normalize

from benchmarks import common, reaching  # noqa: F401 (registers Reaching-v0)
from benchmarks.common import RESULTS, provenance, run_all, write_json
from sb3_reinforce import REINFORCE, AtomicCheckpointCallback, EpisodeVecEnv
from sb3_reinforce.tools import EnvPoolVecEnv

FOLDER = RESULTS / "learning"
#: First seed of the evaluation environments: training seeds are below 2**31 (plus the index of the environment)
EVALUATION_SEED = 2**31 + 10_000
#: Number of EnvPool environments
POOL = 16


class Evaluations(BaseCallback):
    """
    Evaluate the deterministic policy between rollouts, with the clock stopped.

    :param env_id: id of the environment
    :param every: number of steps between evaluations
    :param n_episodes: number of episodes per evaluation
    :param until: stop training when an evaluation reaches this mean return
    """

    def __init__(self, env_id: str, every: int, n_episodes: int, until: float | None):
        super().__init__()
        self.env_id = env_id
        self.every = every
        self.n_episodes = n_episodes
        self.until = until
        self.points: list[dict[str, float]] = []
        self.started = time.perf_counter()
        self.next = every
        self.passed = False
        self.env: VecEnv | None = None

    def _init_callback(self) -> None:
        self.env = self.env or evaluation_env(self.model, self.env_id)

    def _on_step(self) -> bool:
        return not self.passed

    def _on_rollout_start(self) -> None:
        if self.num_timesteps < self.next:
            return
        stopped = time.perf_counter()
        assert self.env is not None
        mean = float(np.mean(evaluate(self.model, self.env, self.n_episodes)))
        training = [info["r"] for info in self.model.ep_info_buffer or []]
        self.points.append(
            dict(
                steps=self.num_timesteps,
                seconds=round(stopped - self.started, 2),
                mean_return=round(mean, 2),
                training_return=round(float(np.mean(training)), 2),
            )
        )
        self.passed = self.until is not None and mean >= self.until
        self.next = (self.num_timesteps // self.every + 1) * self.every
        self.started += time.perf_counter() - stopped


def evaluation_env(model: BaseAlgorithm, env_id: str) -> VecEnv:
    """Create ten evaluation environments, in a frozen ``VecNormalize`` if the model has one."""
    assert model.env is not None
    env: Any = make_vec_env(env_id, 10, EVALUATION_SEED, env_kwargs=dict(render_mode=None), vec_env_cls=EpisodeVecEnv)
    if unwrap_vec_normalize(model.env) is not None:
        env = VecNormalize(env, training=False, norm_reward=False)
    return env


def evaluate(model: BaseAlgorithm, env: VecEnv, n_episodes: int) -> list[float]:
    if isinstance(env, VecNormalize):
        sync_envs_normalization(model.env, env)  # type: ignore[arg-type]
    returns, _ = evaluate_policy(model, env, n_episodes, return_episode_rewards=True)
    assert isinstance(returns, list)
    return returns


def make_pool(manager: Any, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
    """Create the environments of an experiment with EnvPool."""
    return EnvPoolVecEnv(manager.env_name.gym_id, n_envs, manager.seed, **manager.env_kwargs)


def settings_of_v4(algo: str, env_id: str, folder: Path) -> str | None:
    """
    Write a hyperparameter file for a MuJoCo ``-v5`` task, with RL Zoo's hyperparameters of its ``-v4``.

    :return: path of the file; None if RL Zoo has the environment, or neither version
    """
    import rl_zoo3
    import yaml

    settings = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algo}.yml").read_text())
    v4 = env_id.removesuffix("-v5") + "-v4"
    if env_id in settings or v4 not in settings:
        return None
    path = folder / "v5.yml"
    path.write_text(yaml.safe_dump({env_id: settings[v4]}))
    return str(path)


def make_model(
    algo: str,
    env_id: str,
    seed: int,
    timesteps: int | None,
    params: dict[str, Any],
    config: str | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Create a model and the arguments of its ``learn()``."""
    if algo == "defaults":
        model = REINFORCE("MlpPolicy", env_id, seed=seed, device="cpu", **params)
        return model, dict(total_timesteps=timesteps or 1_000_000, callback=[])
    import rl_zoo3.exp_manager

    from sb3_reinforce.tools import register

    register()
    ours = algo in ("reinforce", "workers", "envpool")
    manager_class = rl_zoo3.exp_manager.ExperimentManager
    other_ways = contextlib.ExitStack()
    if algo == "envpool":
        other_ways.enter_context(mock.patch.object(manager_class, "create_envs", make_pool))
        # At least as many steps per batch as with the eight environments of the hyperparameter file
        params = dict(n_envs=POOL, n_steps=63) | params
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), other_ways:
        if config is None and not ours:
            config = settings_of_v4(algo, env_id, Path(folder))
        manager = manager_class(
            argparse.Namespace(workers=2 if algo == "workers" else 0),
            "reinforce" if ours else algo,
            env_id,
            folder,
            n_timesteps=timesteps or 0,
            eval_freq=-1,
            hyperparams=params,
            config=config,
            seed=seed,
            verbose=0,
            device="cpu",
        )
        experiment = manager.setup_experiment()
    assert experiment is not None
    # The folder of the checkpoints is temporary
    callbacks = [callback for callback in manager.callbacks if not isinstance(callback, AtomicCheckpointCallback)]
    return experiment[0], dict(total_timesteps=manager.n_timesteps, callback=callbacks)


def train(algo: str, env_id: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a model and return the results of the run."""
    th.set_num_threads(1)
    model, learning = make_model(algo, env_id, seed, arguments.timesteps, dict(arguments.set))
    evaluations = Evaluations(env_id, arguments.every, arguments.episodes, arguments.until)
    total = learning["total_timesteps"]
    while model.num_timesteps < total and not evaluations.passed:
        callback = [evaluations, *learning["callback"]]
        model.learn(arguments.pieces or total, callback=callback, reset_num_timesteps=arguments.pieces is None)
    seconds = time.perf_counter() - evaluations.started
    # New environments: the final episodes must not depend on earlier evaluations
    final = [] if evaluations.passed else evaluate(model, evaluation_env(model, env_id), 100)
    return dict(
        timesteps=model.num_timesteps,
        seconds=round(seconds, 1),
        evaluations=evaluations.points,
        final_returns=[round(value, 2) for value in final],
    )


def train_tianshou(env_id: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train Tianshou's Reinforce and return the results of the run."""
    options = {name: getattr(arguments, name) for name in ("timesteps", "every", "episodes", "until")}
    options |= dict(seed=seed, evaluation_seed=EVALUATION_SEED)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    return common.tianshou("learn", env_id, *given)


def run(algo: str, name: str, env_id: str, seed: int, arguments: argparse.Namespace) -> None:
    went = train_tianshou(env_id, seed, arguments) if algo == "tianshou" else train(algo, env_id, seed, arguments)
    what = dict(env=env_id, algo=algo, name=name, seed=seed, differs=arguments.set, pieces=arguments.pieces)
    others = [package for package in ("rl_zoo3", "sb3_contrib", "mujoco", "envpool") if package in sys.modules]
    write_json(FOLDER / env_id / name / f"seed_{seed}.json", provenance(*others) | what | went)
    reached = f"{np.mean(went['final_returns']):.1f}" if went["final_returns"] else "stopped early"
    print(f"{env_id} {name} seed {seed}: {reached}, {went['timesteps']:,} steps in {went['seconds']:.0f} s", flush=True)


def seeds(text: str) -> list[int]:
    """Parse a list of seeds, for example ``0,3,1000-1019``."""
    bounds = [[int(bound) for bound in part.split("-")] for part in text.split(",")]
    return [seed for bound in bounds for seed in range(bound[0], bound[-1] + 1)]


def main() -> None:
    from rl_zoo3.utils import StoreDict

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", required=True)
    parser.add_argument(
        "--algo", nargs="+", default=["reinforce"], help="reinforce, defaults, workers, envpool, ppo, a2c, trpo, tianshou"
    )
    parser.add_argument("--seeds", type=seeds, default="8000-8019")
    parser.add_argument("--timesteps", type=int, help="number of training steps (default: from the hyperparameter file)")
    parser.add_argument("--pieces", type=int, help="number of steps per call of learn() (default: a single call)")
    parser.add_argument("--every", type=int, default=10_000, help="number of steps between evaluations")
    parser.add_argument("--episodes", type=int, default=30, help="number of episodes per evaluation")
    parser.add_argument("--until", type=float, help="stop when an evaluation reaches this mean return")
    parser.add_argument("--set", nargs="+", action=StoreDict, default={}, help="hyperparameters to change, as key:value")
    parser.add_argument("--name", help="name of the folder (default: the algorithm); with several algorithms, a prefix")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel processes, with one thread each")
    arguments = parser.parse_args()
    if "tianshou" in arguments.algo and (arguments.set or arguments.pieces):
        parser.error("--set and --pieces are not supported with tianshou")
    if len(arguments.algo) == 1:
        names = [arguments.name or arguments.algo[0]]
    else:
        names = [f"{arguments.name}-{algo}" if arguments.name else algo for algo in arguments.algo]
    missing = [
        (algo, name, env_id, seed, arguments)
        for seed in arguments.seeds
        for env_id in arguments.env
        for algo, name in zip(arguments.algo, names, strict=True)
        if not (FOLDER / env_id / name / f"seed_{seed}.json").exists()
    ]
    run_all(run, missing, arguments.jobs)


if __name__ == "__main__":
    main()
