"""REINFORCE learns: short runs on the identity environments of SB3, to the thresholds that SB3 sets its own algorithms."""

import numpy as np
import pytest
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox, IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
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
            lambda: IdentityEnvBox(eps=0.5), dict(normalize_observations=True, baseline="random"), id="box_normalised"
        ),
    ],
)
def test_learns_to_repeat_the_observation(make, kwargs):
    env = identity_env(make)
    model = REINFORCE("MlpPolicy", env, learning_rate=0.03, n_steps=100, gamma=0.4, seed=0, **kwargs)
    untrained, _ = evaluate_policy(model, env, n_eval_episodes=8)
    assert untrained < 80
    model.learn(12_000)
    evaluate_policy(model, env, n_eval_episodes=20, reward_threshold=90)
    observation, _ = make().reset()
    assert np.shape(model.predict(observation)[0]) == np.shape(observation)
