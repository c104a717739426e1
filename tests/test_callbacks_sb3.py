"""Callbacks and loggers of SB3 work with REINFORCE as they do with A2C."""

import csv
import json
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EventCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import HParam, HumanOutputFormat, TensorBoardOutputFormat, configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_reinforce import REINFORCE
from tests.envs import RandomEnv, scripted

VECTOR = spaces.Box(-1, 1, (3,))
PAIR = spaces.Box(-1, 1, (2,))


def random_env(n_envs=1):
    return DummyVecEnv([lambda: Monitor(RandomEnv(VECTOR, PAIR, 7))] * n_envs)


def make_model(n_envs=1, env=None, **kwargs):
    kwargs = dict(n_steps=16, seed=0, learning_rate=1e-2) | kwargs
    return REINFORCE("MlpPolicy", env or random_env(n_envs), **kwargs)


def weights(model):
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


class Journal(BaseCallback):
    """Writes down which of its methods is called, and at which number of steps."""

    def __init__(self):
        super().__init__()
        self.entries = []

    def note(self, name):
        self.entries.append((name, self.model.num_timesteps))

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


class TestOrderOfCalls:
    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_rollouts_start_and_end_in_turn_with_steps_between(self, n_envs):
        journal = Journal()
        model = make_model(n_envs).learn(100, callback=journal)
        names = journal.names
        assert names[0] == "training_start" and names[-1] == "training_end"
        outside = [name for name in names[1:-1] if name != "step"]
        assert outside == ["rollout_start", "rollout_end"] * model._n_updates
        assert model._n_updates >= 2
        for name, following in pairwise(names[1:]):
            assert (
                following
                in {
                    "rollout_start": {"step"},
                    "step": {"step", "rollout_end"},
                    "rollout_end": {"rollout_start", "training_end"},
                }[name]
            )

    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_every_step_of_all_environments_is_counted_when_the_callback_sees_it(self, n_envs):
        journal = Journal()
        model = make_model(n_envs).learn(100, callback=journal)
        counts = [count for name, count in journal.entries if name == "step"]
        assert counts == list(range(n_envs, model.num_timesteps + 1, n_envs))
        assert journal.n_calls == len(counts)
        assert journal.num_timesteps == model.num_timesteps

    def test_training_without_a_step_calls_no_rollout(self):
        journal = Journal()
        make_model().learn(0, callback=journal)
        assert journal.names == ["training_start", "training_end"]

    def test_the_rollout_is_complete_at_its_end(self):
        seen = []

        class Look(BaseCallback):
            def _on_step(self):
                assert not self.locals["rollout_buffer"].full
                return True

            def _on_rollout_end(self):
                buffer = self.locals["rollout_buffer"]
                assert buffer is self.model.rollout_buffer
                assert buffer.full
                seen.append((buffer.rewards, buffer.returns, buffer.advantages, buffer.values, buffer.episode_starts))

        model = make_model(n_envs=3, gamma=1.0).learn(150, callback=Look())
        assert len(seen) == model._n_updates >= 2
        for rewards, returns, advantages, values, starts in seen:
            assert len(rewards) == len(returns) == len(advantages) >= 3 * 16
            first = np.flatnonzero(starts)
            np.testing.assert_allclose(returns[first], np.add.reduceat(rewards, first))
            np.testing.assert_allclose(advantages, returns - values)
        # The baseline is zero until it has been fitted
        assert not seen[0][3].any()
        assert seen[1][3].any()


class TestLocals:
    #: What A2C computes while acting, and REINFORCE does not need; and a number of steps that whole episodes do not have
    NOT_FOR_REINFORCE = frozenset({"obs_tensor", "values", "log_probs", "n_rollout_steps"})

    @pytest.mark.parametrize("n_envs", [1, 3])
    @pytest.mark.parametrize("action_space", [PAIR, spaces.Discrete(3)], ids=["box", "discrete"])
    def test_hold_what_the_environments_and_the_policy_returned(self, action_space, n_envs):
        env = DummyVecEnv([lambda: Monitor(RandomEnv(VECTOR, action_space, 7))] * n_envs)
        model = make_model(env=env)
        n_steps = 0

        def look(locals_, globals_):
            nonlocal n_steps
            n_steps += 1
            assert locals_["self"] is model
            assert locals_["env"] is env
            assert locals_["rollout_buffer"] is model.rollout_buffer
            assert locals_["total_timesteps"] == 60
            assert locals_["tb_log_name"] == "REINFORCE"
            assert locals_["new_obs"].shape == (n_envs, 3)
            assert locals_["rewards"].shape == (n_envs,)
            assert locals_["dones"].shape == (n_envs,) and locals_["dones"].dtype == bool
            assert len(locals_["infos"]) == n_envs
            assert all(("episode" in info) == done for info, done in zip(locals_["infos"], locals_["dones"], strict=True))
            assert locals_["actions"].shape == locals_["clipped_actions"].shape == (n_envs, *action_space.shape)
            assert all(action_space.contains(action) for action in locals_["clipped_actions"])
            return True

        model.learn(60, callback=look)
        assert n_steps >= 60 / n_envs

    def test_have_the_names_that_a2c_has(self):
        names = {}
        for algorithm in (A2C, REINFORCE):

            def note(locals_, globals_, algorithm=algorithm):
                names[algorithm] = set(locals_)
                return False

            algorithm("MlpPolicy", random_env(), n_steps=16).learn(1, callback=note)
        assert names[A2C] - self.NOT_FOR_REINFORCE <= names[REINFORCE]

    def test_reach_the_callbacks_within_callbacks(self):
        class Look(BaseCallback):
            def _on_step(self):
                np.testing.assert_array_equal(self.locals["new_obs"], self.parent.locals["new_obs"])
                assert self.locals["self"] is self.model
                return True

        class Always(EventCallback):
            def _on_step(self):
                return self._on_event()

        inner = Look()
        model = make_model().learn(40, callback=CallbackList([Always(inner)]))
        assert inner.n_calls == model.num_timesteps

    def test_rewards_may_be_changed_in_place(self):
        """As callbacks that add an exploration bonus do."""

        class Bonus(BaseCallback):
            def _on_step(self):
                self.locals["rewards"][:] = 7.0
                return True

        model = make_model(n_envs=1).learn(1, callback=Bonus())
        np.testing.assert_array_equal(model.rollout_buffer.rewards, 7.0)


class TestCallbacksThatChangeThePolicy:
    @pytest.mark.parametrize("activation_fn", [th.nn.ReLU, th.nn.ELU])
    def test_at_the_start_of_a_rollout_the_rollout_is_collected_with_the_changed_policy(self, activation_fn):
        """As schedules of the exploration noise do. ReLU and ELU act through different code."""

        class Exploit(BaseCallback):
            def _on_rollout_start(self):
                with th.no_grad():
                    self.model.policy.log_std.fill_(-20)

            def _on_step(self):
                return True

            def _on_rollout_end(self):
                expected, _ = self.model.predict(self.model.rollout_buffer.observations, deterministic=True)
                np.testing.assert_allclose(self.model.rollout_buffer.actions.clip(-1, 1), expected, atol=1e-5)

        make_model(policy_kwargs=dict(activation_fn=activation_fn), learning_rate=0.0).learn(50, callback=Exploit())

    @pytest.mark.parametrize("activation_fn", [th.nn.ReLU, th.nn.ELU])
    def test_at_a_step_act_from_the_next_step_on(self, activation_fn):
        class ExploitFromTenthStep(BaseCallback):
            def _on_step(self):
                if self.n_calls == 10:
                    with th.no_grad():
                        self.model.policy.log_std.fill_(-20)
                return True

            def _on_rollout_end(self):
                buffer = self.model.rollout_buffer
                expected, _ = self.model.predict(buffer.observations, deterministic=True)
                off = np.abs(buffer.actions.clip(-1, 1) - expected).max(axis=1)
                assert np.all(off[10:] < 1e-5)
                assert np.any(off[:10] > 1e-2)

        kwargs = dict(policy_kwargs=dict(activation_fn=activation_fn), n_steps=30)
        make_model(**kwargs).learn(1, callback=ExploitFromTenthStep())


class TestStopping:
    class StopAt(BaseCallback):
        def __init__(self, n_calls):
            super().__init__()
            self.last = n_calls

        def _on_step(self):
            return self.n_calls < self.last

    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_within_an_episode_ends_training_without_an_update(self, n_envs):
        model = make_model(n_envs).learn(50)
        before, updates = weights(model), model._n_updates
        journal = Journal()
        model.learn(1000, callback=[self.StopAt(5), journal])
        assert model.num_timesteps == 5 * n_envs
        assert journal.names == ["training_start", "rollout_start", *["step"] * 5, "training_end"]
        assert model._n_updates == updates
        assert th.equal(before, weights(model))

    @pytest.mark.parametrize("seed", [0, None])
    @pytest.mark.parametrize("n_envs", [1, 3])
    @pytest.mark.parametrize("stop_at", [1, 4, 17])
    def test_within_an_episode_learning_can_go_on_with_whole_episodes(self, stop_at, n_envs, seed):
        env = scripted([[6], [6], [6]][:n_envs])
        model = make_model(env=env, n_steps=20, seed=seed).learn(1000, callback=self.StopAt(stop_at))
        model.learn(60, reset_num_timesteps=False)
        buffer = model.rollout_buffer
        # ScriptedEnv: observations are [environment, episode, step]
        assert len(buffer.rewards) % 6 == 0
        np.testing.assert_array_equal(buffer.observations[:, 2], np.tile(np.arange(6), len(buffer.rewards) // 6))
        assert {info["l"] for info in model.ep_info_buffer} == {6}

    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_the_rollout_that_was_stopped_is_collected_anew(self, n_envs):
        whole = make_model(n_envs).learn(100)
        stopped = make_model(n_envs).learn(100, callback=self.StopAt(12))
        while stopped._n_updates < whole._n_updates:
            stopped.learn(1, reset_num_timesteps=False)
        assert th.equal(weights(stopped), weights(whole))

    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_on_max_episodes_counts_the_episodes_of_each_environment(self, n_envs):
        callback = StopTrainingOnMaxEpisodes(max_episodes=10)
        journal = Journal()
        model = make_model(n_envs)
        ended = []
        model.learn(100_000, callback=[callback, journal, at_each_step(lambda locals_: ended.append(locals_["dones"].sum()))])
        assert callback.n_episodes == sum(ended)
        # More than one environment may end an episode at the last step
        assert 10 * n_envs <= callback.n_episodes < 10 * n_envs + n_envs
        assert model.num_timesteps < 1000

    def test_by_a_function(self):
        model = make_model().learn(1000, callback=lambda locals_, globals_: locals_["self"].num_timesteps < 7)
        assert model.num_timesteps == 7


def at_each_step(function):
    """A callback that calls a function of the local variables."""
    return ConvertCallback(lambda locals_, globals_: function(locals_) or True)


class TestEvaluation:
    @pytest.fixture
    def eval_env(self):
        # With a space of its own: the environment draws its observations from it
        return Monitor(RandomEnv(spaces.Box(-1, 1, (3,)), PAIR, 7))

    def test_saves_the_best_model_and_all_results(self, tmp_path, eval_env):
        callback = EvalCallback(
            eval_env, n_eval_episodes=3, eval_freq=20, log_path=tmp_path, best_model_save_path=tmp_path, verbose=0
        )
        model = make_model().learn(100, callback=callback)
        results = np.load(tmp_path / "evaluations.npz")
        np.testing.assert_array_equal(results["timesteps"], np.arange(20, model.num_timesteps + 1, 20))
        assert results["results"].shape == (len(results["timesteps"]), 3)
        assert callback.best_mean_reward == results["results"].mean(axis=1).max()
        best = REINFORCE.load(tmp_path / "best_model", env=random_env())
        assert best.num_timesteps == results["timesteps"][results["results"].mean(axis=1).argmax()]
        assert best.learn(1)._n_updates >= 1

    @pytest.mark.parametrize("threshold, stops", [(-1e9, True), (1e9, False)])
    def test_training_stops_at_a_reward_threshold(self, eval_env, threshold, stops):
        on_best = StopTrainingOnRewardThreshold(reward_threshold=threshold)
        callback = EvalCallback(eval_env, callback_on_new_best=on_best, n_eval_episodes=1, eval_freq=30, verbose=0)
        model = make_model().learn(100, callback=callback)
        assert (model.num_timesteps == 30) == stops

    def test_training_stops_without_improvement(self):
        after_eval = StopTrainingOnNoModelImprovement(max_no_improvement_evals=2, min_evals=1)
        env = gym.make("CartPole-v1", max_episode_steps=5)  # nobody can be better than 5
        callback = EvalCallback(Monitor(env), callback_after_eval=after_eval, n_eval_episodes=1, eval_freq=10, verbose=0)
        model = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=20, seed=0).learn(1000, callback=callback)
        # The first evaluation does not count; the third after it is one more than two without improvement
        assert model.num_timesteps == 40

    @pytest.mark.parametrize("use_sde", [False, True])
    @pytest.mark.parametrize("deterministic", [True, False])
    def test_does_not_change_what_is_learned(self, eval_env, deterministic, use_sde):
        def learn(callback):
            return weights(make_model(n_envs=2, use_sde=use_sde).learn(150, callback=callback))

        callback = EvalCallback(eval_env, n_eval_episodes=2, eval_freq=7, deterministic=deterministic, verbose=0)
        assert th.equal(learn(callback), learn(None))


class TestOtherCallbacksOfSB3:
    def test_checkpoints_are_saved_every_save_freq_calls(self, tmp_path):
        callback = CheckpointCallback(save_freq=15, save_path=tmp_path, name_prefix="x", save_replay_buffer=True)
        model = make_model(n_envs=2).learn(100, callback=callback)
        expected = {f"x_{steps}_steps.zip" for steps in range(30, model.num_timesteps + 1, 30)}
        assert {path.name for path in tmp_path.iterdir()} == expected
        assert REINFORCE.load(tmp_path / "x_60_steps").num_timesteps == 60

    def test_every_n_timesteps_triggers_its_callback(self):
        inner = Journal()
        model = make_model(n_envs=2).learn(100, callback=EveryNTimesteps(n_steps=30, callback=inner))
        assert [count for name, count in inner.entries if name == "step"] == list(range(30, model.num_timesteps + 1, 30))

    def test_logs_every_n_timesteps(self, tmp_path):
        model = make_model()
        model.set_logger(configure(str(tmp_path), ["csv"]))
        model.learn(100, callback=LogEveryNTimesteps(n_steps=25), log_interval=None)
        rows = read_csv(tmp_path)
        assert [int(row["time/total_timesteps"]) for row in rows] == list(range(25, model.num_timesteps + 1, 25))
        assert rows[-1]["train/policy_gradient_loss"]
        assert rows[-1]["rollout/ep_rew_mean"]

    @pytest.mark.parametrize("n_envs", [1, 3])
    def test_the_progress_bar_shows_all_steps_and_is_closed(self, n_envs):
        model = make_model(n_envs)
        callback = ProgressBarCallback()
        model.learn(60, callback=callback)
        assert callback.pbar.total == 60
        assert callback.pbar.n == model.num_timesteps
        assert callback.pbar.disable
        model.learn(60, reset_num_timesteps=False, progress_bar=True)

    def test_all_together_and_again(self, tmp_path):
        callbacks = [
            CheckpointCallback(save_freq=50, save_path=tmp_path),
            EvalCallback(Monitor(RandomEnv(VECTOR, PAIR, 7)), eval_freq=40, n_eval_episodes=1, verbose=0),
            EveryNTimesteps(n_steps=50, callback=CheckpointCallback(save_freq=1, save_path=tmp_path, name_prefix="event")),
        ]
        model = make_model(n_envs=2)
        model.learn(100, callback=CallbackList(callbacks))
        model.learn(100, callback=None)
        model.learn(100, callback=callbacks[:2])
        model.learn(100, callback=lambda locals_, globals_: True)
        assert (tmp_path / "rl_model_100_steps.zip").exists()
        assert (tmp_path / "event_100_steps.zip").exists()


TRAIN_KEYS = {
    "train/policy_gradient_loss",
    "train/entropy_loss",
    "train/bounds_loss",
    "train/explained_variance",
    "train/baseline_mse",
    "train/advantage_std",
    "train/grad_norm",
    "train/approx_kl",
    "train/std",
    "train/learning_rate",
}
ROLLOUT_KEYS = {
    "rollout/episodes",
    "rollout/transitions",
    "rollout/idle_fraction",
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
}
COUNTS = {"train/n_updates", "time/iterations", "time/total_timesteps", "time/time_elapsed"}
KEYS = TRAIN_KEYS | ROLLOUT_KEYS | COUNTS | {"time/fps"}


def read_csv(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_tensorboard(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {key: [event.value for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


class TestLogger:
    def learn(self, tmp_path, *formats, n_envs=2, total_timesteps=150, **kwargs):
        model = make_model(n_envs)
        model.set_logger(configure(str(tmp_path), list(formats)))
        return model.learn(total_timesteps, **kwargs)

    def test_csv(self, tmp_path):
        self.learn(tmp_path, "csv")
        rows = read_csv(tmp_path)
        assert set(rows[-1]) == KEYS
        assert all(np.isfinite(float(rows[-1][key])) for key in KEYS)

    def test_json(self, tmp_path):
        self.learn(tmp_path, "json")
        rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
        assert set(rows[-1]) == KEYS

    def test_tensorboard_gets_all_but_what_is_on_its_axes(self, tmp_path):
        self.learn(tmp_path, "tensorboard")
        assert set(read_tensorboard(tmp_path)) == KEYS - COUNTS

    @pytest.mark.parametrize("format_", ["stdout", "log"])
    def test_text(self, tmp_path, capsys, format_):
        self.learn(tmp_path, format_)
        text = capsys.readouterr().out if format_ == "stdout" else (tmp_path / "log.txt").read_text()
        printed = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")}
        assert {key.split("/")[1] for key in KEYS} <= printed

    def test_discrete_actions_have_neither_standard_deviation_nor_bounds(self, tmp_path):
        model = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=20, seed=0)
        model.set_logger(configure(str(tmp_path), ["csv"]))
        model.learn(200)
        assert set(read_csv(tmp_path)[-1]) == KEYS - {"train/std", "train/bounds_loss"}

    def test_values_are_those_of_the_batch(self, tmp_path):
        model = make_model(policy_kwargs=dict(log_std_init=0.0))
        model.set_logger(configure(str(tmp_path), ["csv"]))
        model.learn(1)
        values = model.logger.name_to_value
        buffer = model.rollout_buffer
        assert values["train/n_updates"] == 1
        # The baseline is still zero
        assert values["train/explained_variance"] == pytest.approx(0)
        assert values["train/baseline_mse"] == pytest.approx(np.mean(buffer.returns**2))
        assert values["train/advantage_std"] == pytest.approx(np.std(buffer.returns))
        assert values["train/entropy_loss"] == pytest.approx(-2 * 0.5 * np.log(2 * np.pi * np.e), rel=1e-4)
        assert values["train/learning_rate"] == 1e-2
        assert values["train/grad_norm"] > 0
        assert values["train/approx_kl"] > 0
        assert values["train/std"] == pytest.approx(1, abs=0.02)
        row = read_csv(tmp_path)[0]
        assert float(row["rollout/transitions"]) == len(buffer.rewards) == model.num_timesteps
        assert float(row["rollout/episodes"]) == buffer.episode_starts.sum()
        assert float(row["rollout/idle_fraction"]) == 0
        n_episodes = int(buffer.episode_starts.sum())
        assert float(row["rollout/ep_len_mean"]) == pytest.approx(len(buffer.rewards) / n_episodes)
        assert float(row["rollout/ep_rew_mean"]) == pytest.approx(buffer.rewards.sum() / n_episodes, rel=1e-4, abs=1e-5)

    @pytest.mark.parametrize("log_interval", [1, 3, None])
    def test_logs_every_log_interval_iterations(self, tmp_path, log_interval):
        model = self.learn(tmp_path, "csv", log_interval=log_interval, total_timesteps=300)
        iterations = [int(row["time/iterations"]) for row in read_csv(tmp_path)]
        assert iterations == ([] if log_interval is None else list(range(log_interval, model._n_updates + 1, log_interval)))

    def test_the_success_rate_is_logged(self, tmp_path):
        class Succeeds(gym.Wrapper):
            def step(self, action):
                obs, reward, terminated, truncated, info = super().step(action)
                return obs, reward, terminated, truncated, info | dict(is_success=terminated)

        env = DummyVecEnv([lambda: Monitor(Succeeds(RandomEnv(VECTOR, PAIR, 7)))] * 2)
        model = make_model(env=env)
        model.set_logger(configure(str(tmp_path), ["csv"]))
        model.learn(300)
        assert 0 < float(read_csv(tmp_path)[-1]["rollout/success_rate"]) < 1

    def test_a_logger_that_was_given_stays(self, tmp_path):
        logger = configure(str(tmp_path), ["csv"])
        model = make_model(verbose=1)
        model.set_logger(logger)
        model.learn(1)
        model.learn(1, reset_num_timesteps=False)
        assert model.logger is logger

    @pytest.mark.parametrize("verbose", [0, 1])
    @pytest.mark.parametrize("with_tensorboard", [False, True])
    def test_default_outputs_follow_verbose_and_tensorboard_log(self, tmp_path, capsys, verbose, with_tensorboard):
        model = make_model(verbose=verbose, tensorboard_log=str(tmp_path) if with_tensorboard else None).learn(1)
        expected = [HumanOutputFormat] * verbose + [TensorBoardOutputFormat] * with_tensorboard
        assert [type(output) for output in model.logger.output_formats] == expected
        assert ("rollout/" in capsys.readouterr().out) == bool(verbose)

    @pytest.mark.parametrize("verbose", [0, 1])
    def test_verbose_names_the_device_and_the_wrappers(self, capsys, verbose):
        make_model(env=RandomEnv(VECTOR, PAIR, 7), verbose=verbose, device="cpu")
        printed = capsys.readouterr().out
        for text in ("Using cpu device", "Wrapping the env with a `Monitor` wrapper", "Wrapping the env in a"):
            assert (text in printed) == bool(verbose), text

    def test_folders_of_tensorboard_are_numbered_by_run(self, tmp_path):
        model = make_model(tensorboard_log=str(tmp_path))
        model.learn(1, callback=HyperparametersCallback())
        model.learn(1, reset_num_timesteps=False)
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"REINFORCE_1"}
        model.learn(1)
        model.learn(1, tb_log_name="other")
        model.learn(1, tb_log_name="other")
        expected = {"REINFORCE_1", "REINFORCE_2", "other_1", "other_2"}
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == expected


class HyperparametersCallback(BaseCallback):
    """From the documentation of SB3: hyperparameters for TensorBoard's own tab."""

    def _on_training_start(self):
        hyperparameters = dict(algorithm=type(self.model).__name__, gamma=self.model.gamma, n_steps=self.model.n_steps)
        record = HParam(hyperparameters, {"rollout/ep_len_mean": 0, "train/baseline_mse": 0.0})
        self.logger.record("hparams", record, exclude=("stdout", "log", "json", "csv"))

    def _on_step(self):
        return True
