"""
Run Tianshou's Reinforce for `benchmarks.throughput` and `benchmarks.learning`, in the virtual environment of the peers.

    .venv-peers/bin/python benchmarks/peer_tianshou.py speed LunarLanderContinuous-v3 1 6000
    .venv-peers/bin/python benchmarks/peer_tianshou.py learn LunarLanderContinuous-v3 --seed 8000 --timesteps 500000

``speed`` prints the steps per second. ``learn`` prints the results of a run as JSON. It uses the hyperparameters of Tianshou's
example, https://github.com/thu-ml/tianshou/blob/master/examples/mujoco/mujoco_reinforce.py, with a linearly decaying learning
rate. The ten environments share one process, as for the other algorithms, instead of using one process each.
"""

import argparse
import json
import platform
import time
from collections import deque
from importlib.metadata import version
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from tianshou.algorithm import Reinforce
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory, LRSchedulerFactoryLinear
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv, VectorEnvNormObs
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorProbabilistic
from tianshou.utils.torch_utils import policy_within_training_step, torch_train_mode

#: Batch size of ``speed``
BATCH = 3000
#: Number of environments, buffer size and steps per batch of Tianshou's example
N_ENVS, BUFFER, COLLECT = 10, 4096, 2048


def gaussian(mean_std: tuple[torch.Tensor, torch.Tensor]) -> torch.distributions.Distribution:
    return torch.distributions.Independent(torch.distributions.Normal(*mean_std), 1)


def iterate(algorithm: Reinforce, collector: Collector, n_steps: int) -> Any:
    """Collect a batch and update, as Tianshou's trainer does; return the statistics of the batch."""
    with policy_within_training_step(algorithm.policy):
        collected = collector.collect(n_step=n_steps)
        with torch_train_mode(algorithm.policy):
            algorithm.update(buffer=collector.buffer, batch_size=None, repeat=1)
    collector.reset_buffer(keep_statistics=True)
    return collected


def speed(env_id: str, n_envs: int, steps: int) -> float:
    envs = DummyVectorEnv([lambda: gym.make(env_id) for _ in range(n_envs)])
    env = gym.make(env_id)
    actor = ContinuousActorProbabilistic(
        preprocess_net=Net(state_shape=env.observation_space.shape, hidden_sizes=[64, 64]),
        action_shape=env.action_space.shape,
        unbounded=True,
    )
    # As in benchmarks.throughput: sample actions from a standard Gaussian, independent of the observation
    torch.nn.init.zeros_(next(module for module in reversed(list(actor.mu.modules())) if hasattr(module, "weight")).weight)
    torch.nn.init.zeros_(actor.sigma_param)
    policy = ProbabilisticActorPolicy(
        actor=actor,
        dist_fn=gaussian,
        action_space=env.action_space,
        observation_space=env.observation_space,
        action_scaling=False,
    )
    algorithm = Reinforce(policy=policy, gamma=0.97, optim=AdamOptimizerFactory(lr=1e-12))
    collector = Collector(algorithm, envs, VectorReplayBuffer(4 * BATCH, n_envs))
    collector.reset()
    iterate(algorithm, collector, BATCH)
    taken, started = 0, time.perf_counter()
    while taken < steps:
        iterate(algorithm, collector, BATCH)
        taken += BATCH
    return taken / (time.perf_counter() - started)


def make_algorithm(env_id: str, timesteps: int) -> Reinforce:
    env = gym.make(env_id)
    actor = ContinuousActorProbabilistic(
        preprocess_net=Net(state_shape=env.observation_space.shape, hidden_sizes=[64, 64], activation=torch.nn.Tanh),
        action_shape=env.action_space.shape,
        unbounded=True,
    )
    torch.nn.init.constant_(actor.sigma_param, -0.5)
    for module in actor.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.orthogonal_(module.weight, gain=np.sqrt(2))
            torch.nn.init.zeros_(module.bias)
    for module in actor.mu.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.mul_(0.01)
    optim = AdamOptimizerFactory(lr=1e-3)
    optim.with_lr_scheduler_factory(LRSchedulerFactoryLinear(1, timesteps, COLLECT))
    policy = ProbabilisticActorPolicy(
        actor=actor,
        dist_fn=gaussian,
        action_space=env.action_space,
        action_scaling=True,
        action_bound_method="tanh",
        # Evaluate the mean action, as for the other algorithms
        deterministic_eval=True,
    )
    return Reinforce(policy=policy, gamma=0.99, optim=optim, return_standardization=True)


def make_envs(env_id: str, seed: int, update_obs_rms: bool) -> VectorEnvNormObs:
    envs = VectorEnvNormObs(DummyVectorEnv([lambda: gym.make(env_id) for _ in range(N_ENVS)]), update_obs_rms)
    envs.seed(seed)
    return envs


def learn(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with the evaluations and the clock of `benchmarks.learning`."""
    np.random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    envs = make_envs(arguments.env, arguments.seed, update_obs_rms=True)
    algorithm = make_algorithm(arguments.env, arguments.timesteps)
    collector = Collector(algorithm, envs, VectorReplayBuffer(BUFFER, N_ENVS), exploration_noise=True)

    def make_tester() -> Collector:
        test_envs = make_envs(arguments.env, arguments.evaluation_seed, update_obs_rms=False)
        test_envs.set_obs_rms(envs.get_obs_rms())
        return Collector(algorithm, test_envs)

    def evaluate(tester: Collector, n_episodes: int) -> np.ndarray:
        tester.reset()
        returns = tester.collect(n_episode=n_episodes).returns
        assert len(returns) == n_episodes
        return returns

    tester = make_tester()
    points: list[dict[str, float]] = []
    training: deque[float] = deque(maxlen=100)
    taken, following, passed = 0, arguments.every, False
    started = time.perf_counter()
    collector.reset()
    while taken < arguments.timesteps and not passed:
        collected = iterate(algorithm, collector, COLLECT)
        taken += int(collected.n_collected_steps)
        training.extend(collected.returns)
        if taken < following:
            continue
        stopped = time.perf_counter()
        mean = float(np.mean(evaluate(tester, arguments.episodes)))
        points.append(
            dict(
                steps=taken,
                seconds=round(stopped - started, 2),
                mean_return=round(mean, 2),
                training_return=round(float(np.mean(training)), 2),
            )
        )
        passed = arguments.until is not None and mean >= arguments.until
        following = (taken // arguments.every + 1) * arguments.every
        started += time.perf_counter() - stopped
    seconds = time.perf_counter() - started
    final: Any = [] if passed else evaluate(make_tester(), 100)
    return dict(
        python=platform.python_version(),
        versions={package: version(package) for package in ("tianshou", "gymnasium", "torch", "numpy")},
        timesteps=taken,
        seconds=round(seconds, 1),
        evaluations=points,
        final_returns=[round(float(value), 2) for value in final],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    speeds = modes.add_parser("speed")
    speeds.add_argument("env")
    speeds.add_argument("n_envs", type=int)
    speeds.add_argument("steps", type=int)
    learns = modes.add_parser("learn")
    learns.add_argument("env")
    learns.add_argument("--seed", type=int, required=True)
    learns.add_argument("--evaluation-seed", type=int, default=2**31)
    learns.add_argument(
        "--timesteps", type=int, default=3_000_000, help="number of training steps (default: 100 epochs of 30,000)"
    )
    learns.add_argument("--every", type=int, default=10_000, help="number of steps between evaluations")
    learns.add_argument("--episodes", type=int, default=30, help="number of episodes per evaluation")
    learns.add_argument("--until", type=float, help="stop when an evaluation reaches this mean return")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.mode == "speed":
        print(speed(arguments.env, arguments.n_envs, arguments.steps))
    else:
        print(json.dumps(learn(arguments)))


if __name__ == "__main__":
    main()
