"""The progress bar; SB3's own callbacks are in test_callbacks_sb3.py."""

import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE
from sb3_reinforce.callbacks import StepsProgressBar
from sb3_reinforce.vec_env import EpisodeVecEnv
from tests.envs import ScriptedEnv


class Count(BaseCallback):
    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("vec_env", [DummyVecEnv, EpisodeVecEnv])
def test_the_bar_moves_by_the_steps_that_were_taken(vec_env):
    env = vec_env([lambda length=length: ScriptedEnv([length]) for length in (3, 8)])
    model = REINFORCE("MlpPolicy", env, n_steps=6)
    for _ in range(2):
        before, bar = model.num_timesteps, StepsProgressBar()
        model.learn(10, callback=bar, reset_num_timesteps=False)
        assert bar.pbar.n == model.num_timesteps - before


@pytest.mark.parametrize("callback", [None, Count(), [Count(), Count()], lambda locals_, globals_: True])
def test_learn_shows_it_beside_whatever_callback_there_is(callback, capsys):
    model = REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=8).learn(20, callback=callback, progress_bar=True)
    assert f"{model.num_timesteps}/20" in capsys.readouterr().out
    for counted in callback if isinstance(callback, list) else [callback]:
        assert not isinstance(counted, Count) or counted.n_calls == model.num_timesteps
