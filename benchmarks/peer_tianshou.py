"""
Steps a second of Tianshou's Reinforce, for `benchmarks.throughput`, which runs this file in the environment of the peers.

    .venv-peers/bin/python benchmarks/peer_tianshou.py LunarLanderContinuous-v3 1 6000
"""

import sys
import time

import gymnasium as gym
import torch
from tianshou.algorithm import Reinforce
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.utils.net.common import Net
from tianshou.utils.net.continuous import ContinuousActorProbabilistic
from tianshou.utils.torch_utils import policy_within_training_step, torch_train_mode

BATCH = 3000


def main() -> None:
    env_id, n_envs, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    envs = DummyVectorEnv([lambda: gym.make(env_id) for _ in range(n_envs)])
    env = gym.make(env_id)
    actor = ContinuousActorProbabilistic(
        preprocess_net=Net(state_shape=env.observation_space.shape, hidden_sizes=[64, 64]),
        action_shape=env.action_space.shape,
        unbounded=True,
    )
    # As for all that are measured: actions are samples of a standard Gaussian, whatever the observation
    torch.nn.init.zeros_(next(module for module in reversed(list(actor.mu.modules())) if hasattr(module, "weight")).weight)
    torch.nn.init.zeros_(actor.sigma_param)
    policy = ProbabilisticActorPolicy(
        actor=actor,
        dist_fn=lambda mean_std: torch.distributions.Independent(torch.distributions.Normal(*mean_std), 1),
        action_space=env.action_space,
        observation_space=env.observation_space,
        action_scaling=False,
    )
    algorithm = Reinforce(policy=policy, gamma=0.97, optim=AdamOptimizerFactory(lr=1e-12))
    collector = Collector(algorithm, envs, VectorReplayBuffer(4 * BATCH, n_envs))
    collector.reset()

    def iterate() -> None:
        with policy_within_training_step(policy):
            collector.collect(n_step=BATCH)
            with torch_train_mode(policy):
                algorithm.update(buffer=collector.buffer, batch_size=None, repeat=1)
        collector.reset_buffer(keep_statistics=True)

    iterate()
    taken, started = 0, time.perf_counter()
    while taken < steps:
        iterate()
        taken += BATCH
    print(taken / (time.perf_counter() - started))


if __name__ == "__main__":
    main()
