"""REINFORCE learns: short runs with the thresholds that SB3 sets its own algorithms."""

import numpy as np
import pytest
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox, IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE


@pytest.mark.parametrize(
    "make_env",
    [
        lambda: IdentityEnv(4),
        pytest.param(lambda: IdentityEnvMultiDiscrete(4), marks=pytest.mark.slow),
        pytest.param(lambda: IdentityEnvMultiBinary(4), marks=pytest.mark.slow),
        pytest.param(lambda: IdentityEnvBox(eps=0.5), marks=pytest.mark.slow),
    ],
    ids=["Discrete", "MultiDiscrete", "MultiBinary", "Box"],
)
def test_the_identity_environments_of_sb3_are_solved(make_env):
    """The best return is 100: one for each action that equals the observation."""

    def make_seeded(index):
        env = make_env()
        # Draws the observations; resets do not seed it
        env.action_space.seed(index)
        return Monitor(env)

    env = DummyVecEnv([lambda index=index: make_seeded(index) for index in range(4)])
    model = REINFORCE("MlpPolicy", env, n_steps=100, gamma=0.4, seed=0)
    untrained, _ = evaluate_policy(model, env, n_eval_episodes=8)
    assert untrained < 80
    model.learn(12_000)
    evaluate_policy(model, env, n_eval_episodes=20, reward_threshold=90)
    observation, _ = make_env().reset()
    assert np.shape(model.predict(observation)[0]) == np.shape(observation)


@pytest.mark.parametrize("policy", ["MlpPolicy", pytest.param(ActorCriticPolicy, marks=pytest.mark.slow)])
def test_cartpole_is_learned_with_all_defaults(policy):
    model = REINFORCE(policy, "CartPole-v1", seed=0)
    untrained, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20, deterministic=False)
    assert untrained < 50
    model.learn(50_000)
    evaluate_policy(model, model.get_env(), n_eval_episodes=20, deterministic=False, reward_threshold=300)
