"""REINFORCE learns: short runs on the identity environments of SB3, to the thresholds that SB3 sets its own algorithms."""

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.envs import IdentityEnv, IdentityEnvBox, IdentityEnvMultiBinary, IdentityEnvMultiDiscrete
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE
from tests.integration.common import assert_same_parameters, weights


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
    model = REINFORCE("MlpPolicy", env, n_steps=100, gamma=0.4, seed=0, **kwargs)
    untrained, _ = evaluate_policy(model, env, n_eval_episodes=8)
    assert untrained < 80
    model.learn(12_000)
    evaluate_policy(model, env, n_eval_episodes=20, reward_threshold=90)
    observation, _ = make().reset()
    assert np.shape(model.predict(observation)[0]) == np.shape(observation)


@pytest.mark.parametrize("policy", ["MlpPolicy", ActorCriticPolicy])
def test_cartpole_is_learned_with_all_defaults(policy):
    """Policies of SB3 have a feature map of their own for the baseline, and no normalization."""
    model = REINFORCE(policy, "CartPole-v1", seed=0)
    # With its noise: without it, one that is not trained may balance the pole for long, or fall at once
    untrained, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=20, deterministic=False)
    assert untrained < 50
    model.learn(50_000)
    evaluate_policy(model, model.get_env(), n_eval_episodes=20, deterministic=False, reward_threshold=300)


def learn_cartpole(n_calls, total_timesteps, **kwargs):
    model = REINFORCE("MlpPolicy", "CartPole-v1", seed=0, **kwargs)
    for _ in range(n_calls):
        model.learn(total_timesteps // n_calls, reset_num_timesteps=False)
    return model


def test_cartpole_is_learned_in_pieces_as_in_one_piece():
    """
    By default, no step knows how long training is to last: 16 calls of ``learn()`` end with the bits of one, and with a policy
    that balances the pole.
    """
    pieces = learn_cartpole(16, 32_000)
    whole = learn_cartpole(1, pieces.num_timesteps)
    assert pieces._n_updates == whole._n_updates > 16
    assert_same_parameters(pieces, whole)
    evaluate_policy(pieces, pieces.get_env(), n_eval_episodes=20, reward_threshold=400)


@pytest.mark.parametrize(
    "kwargs, is_same",
    [
        pytest.param(dict(target_kl=0.02), True, id="target_kl"),
        pytest.param(dict(target_kl=None, learning_rate=1e-2), True, id="learning_rate"),
        pytest.param(dict(target_kl=LinearSchedule(0.02, 0.0, 1.0)), False, id="target_kl_schedule"),
        pytest.param(dict(target_kl=None, learning_rate=LinearSchedule(1e-2, 0.0, 1.0)), False, id="learning_rate_schedule"),
    ],
)
def test_only_schedules_tell_pieces_from_one_piece(kwargs, is_same):
    """With a schedule, each call of ``learn()`` knows of a nearer end."""
    pieces = learn_cartpole(3, 600, n_steps=200, **kwargs)
    whole = learn_cartpole(1, pieces.num_timesteps, n_steps=200, **kwargs)
    assert pieces._n_updates == whole._n_updates == 3
    assert th.equal(weights(pieces), weights(whole)) == is_same
