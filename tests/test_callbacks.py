"""The progress bar and the best policy; SB3's own callbacks are in test_callbacks_sb3.py."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE
from sb3_reinforce.callbacks import KeepBest, StepsProgressBar
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


class TestKeepBest:
    @staticmethod
    def learn(n_steps: int, **kwargs: Any) -> tuple[REINFORCE, list[tuple[float, int, dict[str, th.Tensor]]]]:
        """A model that has learned, and what there was after each rollout: mean return, episodes in it, policy."""
        rollouts = []

        class Rollouts(BaseCallback):
            def _on_step(self) -> bool:
                return True

            def _on_rollout_end(self) -> None:
                returns = [info["r"] for info in self.model.ep_info_buffer]
                rollouts.append((np.mean(returns), len(returns), deepcopy(self.model.policy.state_dict())))

        model = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=200, stats_window_size=20, seed=0, **kwargs)
        return model.learn(n_steps, callback=[Rollouts(), KeepBest()]), rollouts

    def test_what_is_left_is_the_policy_of_the_highest_mean_return(self):
        # What is learned at first is undone by a rate that is far too large
        kwargs = dict(learning_rate=lambda progress: 1e-2 if progress > 0.4 else 0.3, ent_coef=0.0, target_kl=None)
        model, rollouts = self.learn(6000, **kwargs)
        best = max((mean, -index) for index, (mean, n_episodes, _) in enumerate(rollouts) if n_episodes == 20)
        mean, _, policy = rollouts[-best[1]]
        assert mean > rollouts[-1][0]
        for name, value in model.policy.state_dict().items():
            assert th.equal(value, policy[name])

    def test_a_mean_over_few_episodes_does_not_count(self):
        model, rollouts = self.learn(200)
        assert rollouts[-1][1] < 20
        assert any(not th.equal(value, rollouts[-1][2][name]) for name, value in model.policy.state_dict().items())

    def test_each_training_begins_anew(self):
        callback = KeepBest()
        model = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=200, stats_window_size=5, seed=0).learn(600, callback=callback)
        callback.best = np.inf
        model.learn(600, callback=callback)
        assert np.isfinite(callback.best)
