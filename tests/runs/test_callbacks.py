"""Callbacks and loggers of SB3 with REINFORCE, compared to A2C."""

import csv
import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import (
    BaseCallback,
    ConvertCallback,
    EvalCallback,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.logger import HumanOutputFormat, TensorBoardOutputFormat, configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_reinforce import REINFORCE, EpisodeVecEnv
from tests.envs import RandomEnv, ScriptedEnv
from tests.executors import FakeExecutor
from tests.rollouts import StopAt
from tests.runs.common import PAIR, VECTOR, random_env, weights

#: A VecEnv that steps all sub-environments, and one that does not step idle ones
STEPS_ALL, SKIPS_IDLE = pytest.param(VecCheckNan, id="steps_all"), pytest.param(lambda env: env, id="skips_idle")


def make_model(n_envs=1, env=None, **kwargs):
    return REINFORCE("MlpPolicy", env or random_env(n_envs), **(dict(n_steps=16, seed=0) | kwargs))


class Journal(BaseCallback):
    """Record the calls of all methods and the number of steps."""

    def __init__(self):
        super().__init__()
        self.entries = []
        self.n_inits = 0

    def note(self, name):
        self.entries.append((name, self.model.num_timesteps))

    def _init_callback(self):
        self.n_inits += 1

    def _on_training_start(self):
        self.note("training_start")

    def _on_rollout_start(self):
        self.note("rollout_start")

    def _on_step(self):
        self.note("step")
        return True

    def _on_rollout_end(self):
        self.note("rollout_end")

    def _on_training_end(self):
        self.note("training_end")

    @property
    def names(self):
        return [name for name, _ in self.entries]

    def steps(self, name="step"):
        return [count for entry, count in self.entries if entry == name]

    def start_of_rollout(self, n_steps):
        """Number of steps that a model file contains if it is saved during a rollout."""
        return max(count for count in self.steps("rollout_start") if count < n_steps)


def at_each_step(function):
    """Call a function with the local variables."""
    return ConvertCallback(lambda locals_, globals_: function(locals_) or True)


# Calls and local variables


@pytest.mark.parametrize("n_envs", [1, 3])
def test_order_of_calls(n_envs):
    journal = Journal()
    model = make_model(n_envs).learn(100, callback=journal)
    names = journal.names
    assert names[0] == "training_start" and names[-1] == "training_end"
    outside = [name for name in names[1:-1] if name != "step"]
    assert outside == ["rollout_start", "rollout_end"] * model._n_updates
    assert model._n_updates >= 2
    followers = dict(rollout_start={"step"}, step={"step", "rollout_end"}, rollout_end={"rollout_start", "training_end"})
    assert all(following in followers[name] for name, following in pairwise(names[1:]))
    assert journal.n_calls == names.count("step")
    assert journal.num_timesteps == journal.steps()[-1] == model.num_timesteps
    journal.entries.clear()
    model.learn(1000, callback=[StopAt(5), journal])
    assert journal.names == ["training_start", "rollout_start", *["step"] * 5, "training_end"]
    assert model.num_timesteps == 5 * n_envs


@pytest.mark.parametrize("wrap", [STEPS_ALL, SKIPS_IDLE])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("action_space", [PAIR, spaces.Discrete(3)], ids=["box", "discrete"])
def test_local_variables_of_a_step(action_space, n_envs, wrap):
    model = make_model(env=wrap(random_env(n_envs, action_space=action_space)))
    n_idle, n_steps = 0, []

    def look(locals_):
        nonlocal n_idle
        n_steps.append(locals_["n_steps"])
        assert locals_["self"] is model
        assert locals_["env"] is model.get_env()
        assert locals_["rollout_buffer"] is model.rollout_buffer
        assert locals_["n_rollout_steps"] == 16
        assert locals_["total_timesteps"] == 60
        assert locals_["new_obs"].shape == (n_envs, 3)
        rewards, dones, infos, active = (locals_[name] for name in ("rewards", "dones", "infos", "active"))
        assert rewards.shape == dones.shape == active.shape == (n_envs,)
        assert dones.dtype == active.dtype == bool
        assert len(infos) == n_envs
        for name in ("episode", "terminal_observation"):
            assert [name in info for info in infos] == dones.tolist()
        assert locals_["actions"].shape == locals_["clipped_actions"].shape == (n_envs, *action_space.shape)
        assert all(action_space.contains(action) for action in locals_["clipped_actions"])
        n_idle += (~active).sum()
        assert not rewards[~active].any() and not dones[~active].any()
        assert not any(info["TimeLimit.truncated"] for info, is_active in zip(infos, active, strict=True) if not is_active)

    model.learn(60, callback=at_each_step(look))
    assert model._n_updates >= 1
    assert (n_idle > 0) == (n_envs > 1)
    # Counted from 1 in each rollout
    assert n_steps[:2] == [1, 2] and n_steps.count(1) == model._n_updates


def test_local_variables_have_the_names_of_a2c():
    names = {}
    for algorithm in (A2C, REINFORCE):

        def note(locals_, globals_, algorithm=algorithm):
            names[algorithm] = set(locals_)
            return False

        algorithm("MlpPolicy", random_env(), n_steps=16).learn(1, callback=note)
    # A2C computes these while it acts
    assert names[A2C] - names[REINFORCE] <= {"obs_tensor", "values", "log_probs"}


@pytest.mark.parametrize("workers", [None, FakeExecutor(1)], ids=["here", "workers"])
def test_callbacks_can_change_rewards_in_place(workers):
    """Like callbacks that add an exploration bonus."""

    def change(locals_):
        locals_["rewards"][:] = 7.0

    model = make_model(env=lambda: ScriptedEnv([4]), workers=workers).learn(1, callback=at_each_step(change))
    np.testing.assert_array_equal(model.rollout_buffer.rewards, 7.0)


@pytest.mark.parametrize("workers", [None, FakeExecutor(1)], ids=["here", "workers"])
def test_no_callback_equals_one_that_does_nothing(workers):
    def learn(callback):
        model = make_model(env=lambda: ScriptedEnv([4, 7]), workers=workers).learn(60, callback=callback)
        returns = [info["r"] for info in model.ep_info_buffer]
        return weights(model).tolist(), model.num_timesteps, returns, model.logger.name_to_value["rollout/idle_fraction"]

    expected = learn(at_each_step(lambda locals_: None))
    assert learn(None) == expected
    assert expected[1] >= 60 and len(expected[2]) > 5


# Stopping


@pytest.mark.parametrize("wrap", [STEPS_ALL, SKIPS_IDLE])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_stop_training_on_max_episodes(n_envs, wrap):
    callback, ended = StopTrainingOnMaxEpisodes(max_episodes=10), []
    model = make_model(env=wrap(random_env(n_envs)))
    model.learn(100_000, callback=[callback, at_each_step(lambda locals_: ended.append(locals_["dones"].sum()))])
    assert callback.n_episodes == sum(ended) == len(model.ep_info_buffer) + ended[-1]
    # Several episodes can end in the last step
    assert 10 * n_envs <= callback.n_episodes < 10 * n_envs + n_envs
    assert model.num_timesteps < 1000


# Evaluation


@pytest.fixture
def eval_env():
    return Monitor(RandomEnv(VECTOR, PAIR, 7))


def test_eval_callback_saves_the_best_model_and_all_results(tmp_path, eval_env):
    callback = EvalCallback(
        eval_env, n_eval_episodes=3, eval_freq=20, log_path=tmp_path, best_model_save_path=tmp_path, verbose=0
    )
    journal = Journal()
    model = make_model().learn(100, callback=[callback, journal])
    results = np.load(tmp_path / "evaluations.npz")
    np.testing.assert_array_equal(results["timesteps"], np.arange(20, model.num_timesteps + 1, 20))
    assert results["results"].shape == (len(results["timesteps"]), 3)
    means = results["results"].mean(axis=1)
    assert callback.best_mean_reward == means.max()
    best = REINFORCE.load(tmp_path / "best_model", env=random_env())
    assert best.num_timesteps == journal.start_of_rollout(results["timesteps"][means.argmax()])
    assert best.learn(1)._n_updates >= 1


@pytest.mark.parametrize("use_sde", [False, True])
@pytest.mark.parametrize("deterministic", [True, False])
def test_eval_callback_does_not_change_training(eval_env, deterministic, use_sde):
    def learn(callback):
        return weights(make_model(n_envs=2, use_sde=use_sde).learn(150, callback=callback))

    callback = EvalCallback(eval_env, n_eval_episodes=2, eval_freq=7, deterministic=deterministic, verbose=0)
    assert th.equal(learn(callback), learn(None))


# Progress bars


@pytest.mark.parametrize("kwargs", [dict(progress_bar=True), dict(callback=[ProgressBarCallback()])], ids=["true", "callback"])
@pytest.mark.parametrize("make_env", [DummyVecEnv, EpisodeVecEnv, lambda fns: VecNormalize(EpisodeVecEnv(fns))])
def test_progress_bars_do_not_count_idle_steps(make_env, kwargs, capsys):
    """A bar shows the return, and ends where training is stopped, or at its total."""
    fns = [lambda length=length: Monitor(ScriptedEnv([length])) for length in (3, 8)]
    model = make_model(env=make_env(fns), n_steps=6)
    for total in (50, 10):
        before, bar = model.num_timesteps, kwargs.get("callback", [])
        stop = ConvertCallback(lambda locals_, globals_, before=before: model.num_timesteps - before < 35)
        model.learn(total, **kwargs | dict(callback=[*bar, stop]), reset_num_timesteps=False)
        shown = min(model.num_timesteps - before, total)
        shown_line = rf"return -?\d+\.\d: +{100 * shown // total}% ━+[^ ]* *{shown}/{total} +\S+ left"
        assert re.search(shown_line, capsys.readouterr().out)


def test_a_progress_bar_is_closed_after_an_error():
    bar, journal = ProgressBarCallback(), Journal()
    journal.on_learn_end = lambda: journal.entries.append(bar.pbar.disable)  # may print
    with pytest.raises(ZeroDivisionError):
        make_model().learn(20, callback=[journal, bar, at_each_step(lambda locals_: 1 / 0)])
    assert journal.entries[-1] is True


@pytest.mark.parametrize("callback", [Journal(), [Journal(), Journal()], lambda locals_, globals_: True])
def test_progress_bar_true_can_be_combined_with_any_callback(callback, capsys):
    model = make_model().learn(20, callback=callback, progress_bar=True)
    assert "100% ━━━━━━━━━━━━━━━━━━━━ 20/20 " in capsys.readouterr().out
    for journal in callback if isinstance(callback, list) else [callback]:
        assert not isinstance(journal, Journal) or (journal.n_inits, journal.n_calls) == (1, model.num_timesteps)


# Logging

NOT_IN_TENSORBOARD = {"rollout/seed", "train/n_updates", "time/iterations", "time/total_timesteps", "time/time_elapsed"}
KEYS = {"time/fps", "time/between_rollouts", *NOT_IN_TENSORBOARD}
KEYS |= {f"rollout/{name}" for name in ("episodes", "transitions", "idle_fraction", "ep_rew_mean", "ep_len_mean")}
KEYS |= {f"train/{name}" for name in ("policy_gradient_loss", "entropy_loss", "kl_divergence_loss", "grad_norm", "std")}
KEYS |= {f"train/{name}" for name in ("value_loss", "explained_variance", "advantage_std")}
OF_NATURAL_STEPS = {"train/cg_damping", "train/gradient_signal"}


def read_csv(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def learn_and_log(folder, *formats, model=None, total_timesteps=150, **kwargs):
    model = model or make_model(2)
    model.set_logger(configure(str(folder), list(formats)))
    return model.learn(total_timesteps, **kwargs)


def test_all_formats_get_all_keys(tmp_path, capsys):
    learn_and_log(tmp_path, "csv", "json", "tensorboard", "stdout", "log")
    row = read_csv(tmp_path)[-1]
    keys = KEYS | OF_NATURAL_STEPS
    assert set(row) == keys
    assert all(np.isfinite(float(row[key])) for key in keys)
    assert set(json.loads((tmp_path / "progress.json").read_text().splitlines()[-1])) == keys
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == keys - NOT_IN_TENSORBOARD
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text()):
        printed = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")}
        assert {key.split("/")[1] for key in keys} <= printed


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("learning_rate", dict(target_kl=None, learning_rate=LinearSchedule(0.02, 0.0, 1.0))),
        ("kl_divergence_loss", dict(target_kl=LinearSchedule(0.02, 0.0, 1.0), normalize_observations=False)),
    ],
)
def test_logged_values_follow_a_schedule(tmp_path, name, kwargs):
    learn_and_log(tmp_path, "csv", model=make_model(**kwargs), total_timesteps=120)
    rows = read_csv(tmp_path)
    # A row is written before the update, and the schedule uses the progress before the batch
    steps = [0, *(int(row["time/total_timesteps"]) for row in rows[:-2])]
    assert len(steps) >= 4
    expected = 0.02 * (1 - np.array(steps) / 120)
    np.testing.assert_allclose([float(row[f"train/{name}"]) for row in rows[1:]], expected, rtol=1e-3)
    assert set(rows[-1]) == KEYS | ({f"train/{name}"} if name == "learning_rate" else OF_NATURAL_STEPS)


def test_keys_of_a2c_have_the_same_names(tmp_path):
    """TensorBoard then shows both curves in one chart."""
    learn_and_log(tmp_path, "csv", model=A2C("MlpPolicy", random_env(), n_steps=16), log_interval=1)
    # A2C has another name for the policy loss, and always logs a learning rate
    assert set(read_csv(tmp_path)[-1]) - KEYS == {"train/policy_loss", "train/learning_rate"}


def test_logged_values_describe_the_batch(tmp_path):
    model = learn_and_log(tmp_path, "csv", model=make_model(policy_kwargs=dict(log_std_init=0.0)), total_timesteps=1)
    values = model.logger.name_to_value
    buffer = model.rollout_buffer
    assert values["train/n_updates"] == 1
    assert values["train/advantage_std"] == pytest.approx(np.std(buffer.returns))
    assert values["train/entropy_loss"] == pytest.approx(-2 * 0.5 * np.log(2 * np.pi * np.e), rel=1e-4)
    assert values["train/grad_norm"] > 0
    # After the step
    assert values["train/std"] == pytest.approx(model.policy.log_std.exp().mean().item())
    assert values["train/std"] != 1
    (row,) = read_csv(tmp_path)
    assert float(row["rollout/ep_len_mean"]) == pytest.approx(len(buffer.rewards) / buffer.episode_starts.sum())
    returns = [info["r"] for info in model.ep_info_buffer]
    assert float(row["rollout/ep_rew_mean"]) == pytest.approx(np.mean(returns), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("log_interval", [1, 2, None])
def test_log_interval_counts_the_iterations_of_a_run(tmp_path, log_interval):
    """Over several calls of ``learn()``, unless the steps are reset."""
    model = learn_and_log(tmp_path, "csv", log_interval=log_interval)
    n_first = model._n_updates
    model.learn(150, log_interval=log_interval, reset_num_timesteps=False)
    n_run = model._n_updates
    model.learn(150, log_interval=log_interval)
    n_last = model._n_updates - n_run
    assert n_first % 2 == 1 and n_first < n_run
    iterations = [int(row["time/iterations"]) for row in read_csv(tmp_path)]
    every = log_interval or 10**9
    assert iterations == [*range(every, n_run + 1, every), *range(every, n_last + 1, every)]


@pytest.mark.parametrize("verbose", [0, 1])
@pytest.mark.parametrize("with_tensorboard", [False, True])
def test_default_outputs(tmp_path, capsys, verbose, with_tensorboard):
    env = RandomEnv(VECTOR, PAIR, 7)
    model = make_model(env=env, verbose=verbose, tensorboard_log=str(tmp_path) if with_tensorboard else None, device="cpu")
    model.learn(1)
    expected = [HumanOutputFormat] * verbose + [TensorBoardOutputFormat] * with_tensorboard
    assert [type(output) for output in model.logger.output_formats] == expected
    printed = capsys.readouterr().out
    for text in ("Using cpu device", "Wrapping the env with a `Monitor` wrapper", "Wrapping the env in a", "rollout/"):
        assert (text in printed) == bool(verbose), text
    logger = configure(None, [])
    model.set_logger(logger)
    assert model.learn(1).logger is logger
