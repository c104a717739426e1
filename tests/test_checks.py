"""What is refused, and in what words."""

import io
import zipfile
from inspect import signature
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from torch import nn

from sb3_reinforce import REINFORCE
from tests.envs import ScriptedEnv


class TestArguments:
    def test_recurrent_policies_are_refused(self):
        with pytest.raises(ValueError, match="not recurrent"):
            REINFORCE(RecurrentActorCriticPolicy, ScriptedEnv([4]))

    def test_no_environment_is_refused_unless_the_model_is_set_up_later(self):
        with pytest.raises(ValueError, match="env=None has no spaces"):
            REINFORCE("MlpPolicy", None)
        REINFORCE("MlpPolicy", None, _init_setup_model=False)

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            *[("n_steps", value) for value in (0, -1, 2.5, "3", True, None)],
            *[("n_episodes", value) for value in (0, -3, 1.5, True)],
            *[("gamma", value) for value in (0.0, -0.1, 1.1, np.nan, None)],
            *[(name, value) for name in ("ent_coef", "bounds_coef") for value in (-0.1, np.nan, np.inf)],
            *[("max_grad_norm", value) for value in (0.0, -1.0, np.nan, np.inf)],
            *[("target_kl", value) for value in (0.0, -1.0, np.nan, np.inf)],
            *[("learning_rate", value) for value in (-1e-3, np.nan, np.inf)],
            *[("max_episode_steps", value) for value in (0, 1.5)],
            *[("baseline_memory", value) for value in (-0.1, 1.0, np.nan)],
            ("baseline", "cubic"),
            ("stats_window_size", 0),
            ("rollout_buffer_class", RolloutBuffer),
        ],
    )
    def test_out_of_range_is_refused_by_name_and_value(self, argument: str, value: Any):
        with pytest.raises(ValueError) as error:
            REINFORCE("MlpPolicy", ScriptedEnv([4]), **{argument: value})
        assert argument in str(error.value)
        assert str(value) in str(error.value)

    def test_n_steps_and_n_episodes_exclude_each_other(self):
        default = int(signature(REINFORCE).parameters["n_steps"].default)
        for n_steps in (100, default):
            with pytest.raises(ValueError, match=f"Exactly one .* got n_steps={n_steps}, n_episodes=5"):
                REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=n_steps, n_episodes=5)
        assert REINFORCE("MlpPolicy", ScriptedEnv([4]), n_episodes=5).n_steps is None

    @pytest.mark.parametrize("argument", ["gae_lambda", "vf_coef", "rms_prop_eps", "use_rms_prop", "nonsense"])
    def test_arguments_without_a_meaning_here_are_type_errors(self, argument: str):
        with pytest.raises(TypeError, match=argument):
            REINFORCE("MlpPolicy", ScriptedEnv([4]), **{argument: 1.0})

    def test_other_policies(self):
        with pytest.raises(ValueError, match="Policy LstmPolicy unknown"):
            REINFORCE("LstmPolicy", ScriptedEnv([4]))
        with pytest.raises(ValueError, match="ActorCriticPolicy"):
            REINFORCE(nn.Module, ScriptedEnv([4]))

    def test_foreign_policies_bring_their_own_features(self):
        policy = A2C("MlpPolicy", ScriptedEnv([4])).policy_class
        REINFORCE(policy, ScriptedEnv([4]), n_steps=8).learn(16)
        for kwargs in (dict(baseline="quadratic"), dict(normalize_observations=True)):
            with pytest.raises(ValueError, match="ActorCriticPolicy: a policy of sb3_reinforce"):
                REINFORCE(policy, ScriptedEnv([4]), **kwargs)

    def test_action_spaces(self):
        env = ScriptedEnv([4])
        env.action_space = spaces.Box(-np.inf, np.inf, (2,))
        REINFORCE("MlpPolicy", env, n_steps=8).learn(16)
        with pytest.raises(ValueError, match="squash_output=True needs finite action bounds"):
            REINFORCE("MlpPolicy", env, use_sde=True, policy_kwargs=dict(squash_output=True))
        env.action_space = spaces.Box(-1, 1, (2,))
        env.action_space.low[0] = np.nan
        with pytest.raises(ValueError, match="NaN bounds: low="):
            REINFORCE("MlpPolicy", env)
        env.action_space = spaces.Dict({"a": spaces.Discrete(2)})
        with pytest.raises(ValueError, match="supports the action spaces Box, Discrete, MultiDiscrete, MultiBinary"):
            REINFORCE("MlpPolicy", env)
        env.action_space = spaces.Discrete(3)
        with pytest.raises(ValueError, match=r"use_sde=True .* needs continuous actions"):
            REINFORCE("MlpPolicy", env, use_sde=True)

    def test_learning_needs_an_environment(self):
        stream = io.BytesIO()
        REINFORCE("MlpPolicy", ScriptedEnv([4])).save(stream)
        with pytest.raises(ValueError, match="no environment to learn from"):
            REINFORCE.load(stream).learn(10)


class TestModelFiles:
    @pytest.mark.parametrize("cls", [A2C, PPO])
    def test_other_algorithms_are_refused(self, cls: type, tmp_path: Any):
        cls("MlpPolicy", "CartPole-v1").save(tmp_path / "other")
        with pytest.raises(ValueError, match=r"other holds a model of another algorithm.*stable_baselines3"):
            REINFORCE.load(tmp_path / "other")

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
    def test_a_file_cut_short_is_refused(self, share: float, tmp_path: Any):
        path = tmp_path / "model.zip"
        REINFORCE("MlpPolicy", "CartPole-v1").save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match=r"model.zip is no complete model file"):
            REINFORCE.load(path)

    def test_a_zip_of_something_else_is_refused(self, tmp_path: Any):
        path = tmp_path / "photos.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("photo.png", b"...")
        with pytest.raises(ValueError, match=r"photos.zip is no complete model file"):
            REINFORCE.load(path)

    def test_another_action_space_is_refused(self, tmp_path: Any):
        REINFORCE("MlpPolicy", "CartPole-v1").save(tmp_path / "model")
        env = gym.make("CartPole-v1")
        env.action_space = spaces.Discrete(5)
        with pytest.raises(ValueError, match=r"Action spaces do not match: Discrete\(2\) != Discrete\(5\)"):
            REINFORCE.load(tmp_path / "model", env=env)

    def test_arguments_given_to_load_are_checked(self, tmp_path: Any):
        REINFORCE("MlpPolicy", "CartPole-v1").save(tmp_path / "model")
        with pytest.raises(ValueError, match="gamma must be in"):
            REINFORCE.load(tmp_path / "model", gamma=2.0)
