"""The progress bar, and a callback from SB3's documentation; SB3's own callbacks are in tests/integration."""

from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from sb3_reinforce import REINFORCE
from sb3_reinforce.callbacks import StepsProgressBar
from sb3_reinforce.vec_env import EpisodeVecEnv
from tests.envs import ScriptedEnv


class Count(BaseCallback):
    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("make", [DummyVecEnv, EpisodeVecEnv, lambda fns: VecNormalize(EpisodeVecEnv(fns))])
def test_the_progress_bar_moves_by_the_steps_that_were_taken(make: Any):
    env = make([lambda length=length: ScriptedEnv([length]) for length in (3, 8)])
    model = REINFORCE("MlpPolicy", env, n_steps=6)
    for _ in range(2):
        before, bar = model.num_timesteps, StepsProgressBar()
        model.learn(10, callback=bar, reset_num_timesteps=False)
        assert bar.pbar.n == model.num_timesteps - before


@pytest.mark.parametrize("callback", [None, Count(), [Count(), Count()], lambda locals_, globals_: True])
def test_learn_shows_the_progress_bar_beside_whatever_callback_there_is(callback: Any, capsys: pytest.CaptureFixture):
    model = REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=8).learn(20, callback=callback, progress_bar=True)
    assert f"{model.num_timesteps}/20" in capsys.readouterr().out
    for counted in callback if isinstance(callback, list) else [callback]:
        assert not isinstance(counted, Count) or counted.n_calls == model.num_timesteps


class HParamCallback(BaseCallback):
    """From SB3's documentation ("TensorBoard integration"): default arguments are values that TensorBoard can show."""

    def _on_training_start(self) -> None:
        hparam_dict = {
            "algorithm": self.model.__class__.__name__,
            "learning rate": self.model.learning_rate,
            "gamma": self.model.gamma,
        }
        metric_dict = {"rollout/ep_len_mean": 0, "train/value_loss": 0.0}
        self.logger.record(
            "hparams",
            HParam(hparam_dict, metric_dict),
            exclude=("stdout", "log", "json", "csv"),  # type: ignore[arg-type]
        )

    def _on_step(self) -> bool:
        return True


def test_the_hyperparameter_callback_of_the_documentation_works_with_the_default_arguments(tmp_path: Path):
    model = REINFORCE("MlpPolicy", ScriptedEnv([4]), tensorboard_log=str(tmp_path))
    model.learn(2001, callback=HParamCallback())
    events = EventAccumulator(str(tmp_path / "REINFORCE_1"))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["algorithm"].string_value == "REINFORCE"
    assert hparams["learning rate"].number_value == model.learning_rate
    assert hparams["gamma"].number_value == model.gamma
    assert {"rollout/ep_len_mean", "train/value_loss"} <= set(events.Tags()["scalars"])
