"""REINFORCE learns: short runs on the identity environments of SB3, to the thresholds that SB3 sets its own algorithms."""

import numpy as np
import pytest
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox, IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE


def identity_env(make, n_envs=4):
    """Environments that reward the action that equals the observation: 100 steps an episode, so a return of 100 at most."""

    def make_seeded(index):
        env = make()
        # Where the observations are drawn from; resets do not seed it
        env.action_space.seed(index)
        return Monitor(env)

    return DummyVecEnv([lambda index=index: make_seeded(index) for index in range(n_envs)])


@pytest.mark.parametrize(
    "make, kwargs",
    [
        pytest.param(lambda: IdentityEnv(4), {}, id="discrete"),
        pytest.param(lambda: IdentityEnvMultiDiscrete(4), {}, id="multi_discrete"),
        pytest.param(lambda: IdentityEnvMultiBinary(4), {}, id="multi_binary"),
        pytest.param(lambda: IdentityEnvBox(eps=0.5), {}, id="box"),
        pytest.param(
            lambda: IdentityEnvBox(eps=0.5),
            dict(baseline="linear", baseline_memory=0.0, normalize_observations=False),
            id="box_linear_baseline",
        ),
    ],
)
def test_the_identity_environments_of_sb3_are_solved(make, kwargs):
    env = identity_env(make)
    model = REINFORCE("MlpPolicy", env, learning_rate=0.03, n_steps=100, gamma=0.4, seed=0, **kwargs)
    untrained, _ = evaluate_policy(model, env, n_eval_episodes=8)
    assert untrained < 80
    model.learn(12_000)
    evaluate_policy(model, env, n_eval_episodes=20, reward_threshold=90)
    observation, _ = make().reset()
    assert np.shape(model.predict(observation)[0]) == np.shape(observation)


@pytest.mark.parametrize("policy", ["MlpPolicy", ActorCriticPolicy])
def test_cartpole_is_learned_with_all_defaults(policy):
    """Policies of SB3 have a feature map of their own for the baseline, and no normalization."""
    model = REINFORCE(policy, "CartPole-v1", seed=1)
    untrained, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=10)
    assert untrained < 50
    model.learn(64_000)
    evaluate_policy(model, model.get_env(), n_eval_episodes=20, reward_threshold=100)
