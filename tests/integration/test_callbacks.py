"""Callbacks and loggers of SB3 work with REINFORCE as they do with A2C."""

import csv
import json
from inspect import signature
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
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from sb3_reinforce import REINFORCE
from tests.envs import RandomEnv
from tests.integration.common import PAIR, VECTOR, assert_stepped_as_asked, random_env, weights

#: What is stepped as it is, and what leaves idle environments alone
AS_IT_IS, LEFT_ALONE = pytest.param(VecCheckNan, id="as_it_is"), pytest.param(lambda env: env, id="left_alone")


def make_model(n_envs=1, env=None, **kwargs):
    return REINFORCE("MlpPolicy", env or random_env(n_envs), **(dict(n_steps=16, seed=0) | kwargs))


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

    def rollout_of(self, n_steps):
        """Steps at the beginning of the rollout that took a step: what a file has that was saved then."""
        return max(count for name, count in self.entries if name == "rollout_start" and count < n_steps)


def at_each_step(function):
    """A callback that calls a function of the local variables."""
    return ConvertCallback(lambda locals_, globals_: function(locals_) or True)


# What callbacks see


@pytest.mark.parametrize("n_envs", [1, 3])
def test_callbacks_see_rollouts_start_and_end_in_turn_with_steps_between(n_envs):
    journal = Journal()
    model = make_model(n_envs).learn(100, callback=journal)
    names = journal.names
    assert names[0] == "training_start" and names[-1] == "training_end"
    outside = [name for name in names[1:-1] if name != "step"]
    assert outside == ["rollout_start", "rollout_end"] * model._n_updates
    assert model._n_updates >= 2
    followers = {
        "rollout_start": {"step"},
        "step": {"step", "rollout_end"},
        "rollout_end": {"rollout_start", "training_end"},
    }
    for name, following in pairwise(names[1:]):
        assert following in followers[name]


@pytest.mark.parametrize("wrap", [AS_IT_IS, LEFT_ALONE])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_steps_are_counted_when_callbacks_see_them(n_envs, wrap):
    journal, active = Journal(), []
    note_active = at_each_step(lambda locals_: active.append(locals_["active"].sum()))
    model = make_model(env=wrap(random_env(n_envs))).learn(100, callback=[journal, note_active])
    counts = [count for name, count in journal.entries if name == "step"]
    n_stepped = np.diff(counts, prepend=0)
    np.testing.assert_array_equal(n_stepped, n_envs if wrap is VecCheckNan else active)
    assert journal.n_calls == len(counts)
    assert journal.num_timesteps == model.num_timesteps == counts[-1]


def test_training_without_a_step_calls_no_rollout():
    journal = Journal()
    make_model().learn(0, callback=journal)
    assert journal.names == ["training_start", "training_end"]


def test_the_rollout_is_complete_when_callbacks_see_its_end():
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


@pytest.mark.parametrize("wrap", [AS_IT_IS, LEFT_ALONE])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("action_space", [PAIR, spaces.Discrete(3)], ids=["box", "discrete"])
def test_local_variables_are_what_the_environments_and_the_policy_returned(action_space, n_envs, wrap):
    model = make_model(env=wrap(random_env(n_envs, action_space=action_space)))
    n_idle = 0

    def look(locals_):
        nonlocal n_idle
        assert locals_["self"] is model
        assert locals_["env"] is model.get_env()
        assert locals_["rollout_buffer"] is model.rollout_buffer
        assert locals_["total_timesteps"] == 60
        assert locals_["tb_log_name"] == "REINFORCE"
        assert locals_["new_obs"].shape == (n_envs, 3)
        rewards, dones, infos, active = (locals_[name] for name in ("rewards", "dones", "infos", "active"))
        assert rewards.shape == dones.shape == active.shape == (n_envs,)
        assert dones.dtype == active.dtype == bool
        assert len(infos) == n_envs
        for name in ("episode", "terminal_observation"):
            assert [name in info for info in infos] == dones.tolist()
        assert locals_["actions"].shape == locals_["clipped_actions"].shape == (n_envs, *action_space.shape)
        assert all(action_space.contains(action) for action in locals_["clipped_actions"])
        # Idle environments bring nothing and end nothing
        n_idle += (~active).sum()
        assert not rewards[~active].any() and not dones[~active].any()
        assert not any(info["TimeLimit.truncated"] for info, is_active in zip(infos, active, strict=True) if not is_active)

    model.learn(60, callback=at_each_step(look))
    assert model._n_updates >= 1
    assert (n_idle > 0) == (n_envs > 1)


def test_local_variables_have_the_names_that_they_have_in_a2c():
    names = {}
    for algorithm in (A2C, REINFORCE):

        def note(locals_, globals_, algorithm=algorithm):
            names[algorithm] = set(locals_)
            return False

        algorithm("MlpPolicy", random_env(), n_steps=16).learn(1, callback=note)
    # What A2C computes while acting; and a number of steps that whole episodes do not have
    assert names[A2C] - names[REINFORCE] <= {"obs_tensor", "values", "log_probs", "n_rollout_steps"}


def test_local_variables_reach_the_callbacks_within_callbacks():
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


# What callbacks change


def test_callbacks_may_change_rewards_in_place():
    """As those do that add an exploration bonus."""

    class Bonus(BaseCallback):
        def _on_step(self):
            self.locals["rewards"][:] = 7.0
            return True

    model = make_model(n_envs=1).learn(1, callback=Bonus())
    np.testing.assert_array_equal(model.rollout_buffer.rewards, 7.0)


@pytest.mark.parametrize("activation_fn", [th.nn.Tanh, th.nn.ELU])
def test_a_policy_changed_at_the_start_of_a_rollout_collects_it(activation_fn):
    """As schedules of the exploration noise do. Tanh and ELU act through different code."""

    class Exploit(BaseCallback):
        def _on_rollout_start(self):
            with th.no_grad():
                self.model.policy.log_std.fill_(-20)

        def _on_step(self):
            return True

        def _on_rollout_end(self):
            expected, _ = self.model.predict(self.model.rollout_buffer.observations, deterministic=True)
            np.testing.assert_allclose(self.model.rollout_buffer.actions.clip(-1, 1), expected, atol=1e-5)

    model = make_model(policy_kwargs=dict(activation_fn=activation_fn), target_kl=None, learning_rate=0.0)
    model.learn(50, callback=Exploit())


# What stops training


class StopAt(BaseCallback):
    def __init__(self, n_calls):
        super().__init__()
        self.last = n_calls

    def _on_step(self):
        return self.n_calls < self.last


@pytest.mark.parametrize("n_envs", [1, 3])
def test_training_stopped_within_an_episode_makes_no_update(n_envs):
    model = make_model(n_envs).learn(50)
    before, updates = weights(model), model._n_updates
    journal = Journal()
    model.learn(1000, callback=[StopAt(5), journal])
    assert model.num_timesteps == 5 * n_envs
    assert journal.names == ["training_start", "rollout_start", *["step"] * 5, "training_end"]
    assert model._n_updates == updates
    assert th.equal(before, weights(model))


@pytest.mark.parametrize("wrap", [AS_IT_IS, LEFT_ALONE])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_stop_training_on_max_episodes_counts_the_episodes_of_the_batches(n_envs, wrap):
    callback, ended = StopTrainingOnMaxEpisodes(max_episodes=10), []
    model = make_model(env=wrap(random_env(n_envs)))
    model.learn(100_000, callback=[callback, at_each_step(lambda locals_: ended.append(locals_["dones"].sum()))])
    assert callback.n_episodes == sum(ended) == len(model.ep_info_buffer) + ended[-1]
    # More than one environment may end an episode at the last step
    assert 10 * n_envs <= callback.n_episodes < 10 * n_envs + n_envs
    assert model.num_timesteps < 1000


def test_a_function_can_stop_training():
    model = make_model().learn(1000, callback=lambda locals_, globals_: locals_["self"].num_timesteps < 7)
    assert model.num_timesteps == 7


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
    assert callback.best_mean_reward == results["results"].mean(axis=1).max()
    best = REINFORCE.load(tmp_path / "best_model", env=random_env())
    assert best.num_timesteps == journal.rollout_of(results["timesteps"][results["results"].mean(axis=1).argmax()])
    assert best.learn(1)._n_updates >= 1


@pytest.mark.parametrize("threshold, stops", [(-1e9, True), (1e9, False)])
def test_a_reward_threshold_stops_training(eval_env, threshold, stops):
    on_best = StopTrainingOnRewardThreshold(reward_threshold=threshold)
    callback = EvalCallback(eval_env, callback_on_new_best=on_best, n_eval_episodes=1, eval_freq=30, verbose=0)
    model = make_model().learn(100, callback=callback)
    assert (model.num_timesteps == 30) == stops


def test_no_improvement_stops_training():
    after_eval = StopTrainingOnNoModelImprovement(max_no_improvement_evals=2, min_evals=1)
    env = gym.make("CartPole-v1", max_episode_steps=5)  # nobody can be better than 5
    callback = EvalCallback(Monitor(env), callback_after_eval=after_eval, n_eval_episodes=1, eval_freq=10, verbose=0)
    model = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=20, seed=0).learn(1000, callback=callback)
    # The first evaluation does not count; the third after it is one more than two without improvement
    assert model.num_timesteps == 40


@pytest.mark.parametrize("use_sde", [False, True])
@pytest.mark.parametrize("deterministic", [True, False])
def test_eval_callback_does_not_change_what_is_learned(eval_env, deterministic, use_sde):
    def learn(callback):
        return weights(make_model(n_envs=2, use_sde=use_sde).learn(150, callback=callback))

    callback = EvalCallback(eval_env, n_eval_episodes=2, eval_freq=7, deterministic=deterministic, verbose=0)
    assert th.equal(learn(callback), learn(None))


# Other callbacks of SB3


def test_checkpoint_callback_saves_every_save_freq_calls(tmp_path):
    callback = CheckpointCallback(save_freq=15, save_path=tmp_path, name_prefix="x", save_replay_buffer=True)
    journal = Journal()
    make_model(n_envs=2).learn(100, callback=[callback, journal])
    expected = [count for name, count in journal.entries if name == "step"][14::15]
    assert {path.name for path in tmp_path.iterdir()} == {f"x_{count}_steps.zip" for count in expected}
    for count in expected:
        assert REINFORCE.load(tmp_path / f"x_{count}_steps").num_timesteps == journal.rollout_of(count)


def test_every_n_timesteps_triggers_its_callback():
    inner = Journal()
    model = make_model().learn(100, callback=EveryNTimesteps(n_steps=30, callback=inner))
    assert [count for name, count in inner.entries if name == "step"] == list(range(30, model.num_timesteps + 1, 30))


def test_log_every_n_timesteps_has_the_keys_of_the_latest_update(tmp_path):
    model = make_model()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(100, callback=LogEveryNTimesteps(n_steps=25), log_interval=None)
    rows = read_csv(tmp_path)
    assert [int(row["time/total_timesteps"]) for row in rows] == list(range(25, model.num_timesteps + 1, 25))
    assert rows[-1]["train/policy_gradient_loss"]
    assert rows[-1]["rollout/ep_rew_mean"]


@pytest.mark.filterwarnings("ignore:rich is experimental")
@pytest.mark.parametrize("wrap, n_envs", [(lambda env: env, 1), (VecCheckNan, 3)], ids=["one", "several_as_they_are"])
def test_the_progress_bar_of_sb3_shows_all_steps_and_is_closed(wrap, n_envs):
    """Where every environment is stepped each time; ``progress_bar=True`` is right everywhere."""
    model = make_model(env=wrap(random_env(n_envs)))
    callback = ProgressBarCallback()
    model.learn(60, callback=callback)
    assert callback.pbar.total == 60
    assert callback.pbar.n == model.num_timesteps
    assert callback.pbar.disable


def test_callbacks_can_be_combined_and_used_again(tmp_path):
    callbacks = [
        CheckpointCallback(save_freq=50, save_path=tmp_path),
        EvalCallback(Monitor(RandomEnv(VECTOR, PAIR, 7)), eval_freq=40, n_eval_episodes=1, verbose=0),
        EveryNTimesteps(n_steps=50, callback=CheckpointCallback(save_freq=1, save_path=tmp_path, name_prefix="event")),
    ]
    model = make_model()
    model.learn(120, callback=CallbackList(callbacks))
    model.learn(120, callback=None)
    # The first has been called 120 times or a few more
    model.learn(120, callback=callbacks[:2])
    model.learn(120, callback=lambda locals_, globals_: True)
    assert (tmp_path / "rl_model_50_steps.zip").exists() and (tmp_path / "rl_model_100_steps.zip").exists()
    assert (tmp_path / "event_50_steps.zip").exists() and (tmp_path / "event_100_steps.zip").exists()
    assert len(list(tmp_path.glob("rl_model_*_steps.zip"))) >= 4


# Logging

TRAIN_KEYS = {
    "train/policy_gradient_loss",
    "train/entropy_loss",
    "train/explained_variance",
    "train/value_loss",
    "train/advantage_std",
    "train/grad_norm",
    "train/kl_divergence_loss",
    "train/std",
}
ROLLOUT_KEYS = {
    "rollout/episodes",
    "rollout/transitions",
    "rollout/idle_fraction",
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
}
NOT_IN_TENSORBOARD = {"rollout/seed", "train/n_updates", "time/iterations", "time/total_timesteps", "time/time_elapsed"}
KEYS = TRAIN_KEYS | ROLLOUT_KEYS | NOT_IN_TENSORBOARD | {"time/fps", "time/between_rollouts"}


def read_csv(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_tensorboard(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {key: [event.value for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


def learn_and_log(folder, *formats, n_envs=2, total_timesteps=150, **kwargs):
    model = make_model(n_envs)
    model.set_logger(configure(str(folder), list(formats)))
    return model.learn(total_timesteps, **kwargs)


def test_csv_gets_all_keys(tmp_path):
    learn_and_log(tmp_path, "csv")
    rows = read_csv(tmp_path)
    assert set(rows[-1]) == KEYS
    assert all(np.isfinite(float(rows[-1][key])) for key in KEYS)


def test_json_gets_all_keys(tmp_path):
    learn_and_log(tmp_path, "json")
    rows = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert set(rows[-1]) == KEYS


def test_tensorboard_gets_all_keys_but_the_seed_and_what_is_on_its_axes(tmp_path):
    learn_and_log(tmp_path, "tensorboard")
    assert set(read_tensorboard(tmp_path)) == KEYS - NOT_IN_TENSORBOARD


@pytest.mark.parametrize("format_", ["stdout", "log"])
def test_text_gets_all_keys(tmp_path, capsys, format_):
    learn_and_log(tmp_path, format_)
    text = capsys.readouterr().out if format_ == "stdout" else (tmp_path / "log.txt").read_text()
    printed = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")}
    assert {key.split("/")[1] for key in KEYS} <= printed


def test_discrete_actions_have_no_standard_deviation(tmp_path):
    model = REINFORCE("MlpPolicy", "CartPole-v1", n_steps=20, seed=0)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(200)
    assert set(read_csv(tmp_path)[-1]) == KEYS - {"train/std"}


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("learning_rate", dict(target_kl=None, learning_rate=LinearSchedule(0.02, 0.0, 1.0))),
        ("kl_divergence_loss", dict(target_kl=LinearSchedule(0.02, 0.0, 1.0))),
    ],
)
def test_what_is_logged_of_each_step_follows_its_schedule(tmp_path, name, kwargs):
    model = make_model(**kwargs)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(120)
    rows = read_csv(tmp_path)
    # A row is written before its batch is learned from, and the schedule looks at the steps before the batch
    steps = [0, *(int(row["time/total_timesteps"]) for row in rows[:-2])]
    assert len(steps) >= 4
    expected = 0.02 * (1 - np.array(steps) / 120)
    np.testing.assert_allclose([float(row[f"train/{name}"]) for row in rows[1:]], expected, rtol=1e-3)
    assert set(rows[-1]) == KEYS | {f"train/{name}"}


def test_keys_that_a2c_has_too_have_the_same_names(tmp_path):
    """So that TensorBoard lays the curves over each other."""
    model = A2C("MlpPolicy", random_env(), n_steps=16)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(200, log_interval=1)
    # A2C calls the loss of the policy by another name, and always has a learning rate
    assert set(read_csv(tmp_path)[-1]) - KEYS == {"train/policy_loss", "train/learning_rate"}


def test_logged_values_are_those_of_the_batch(tmp_path):
    model = make_model(policy_kwargs=dict(log_std_init=0.0))
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(1)
    values = model.logger.name_to_value
    buffer = model.rollout_buffer
    assert values["train/n_updates"] == 1
    # The baseline is still zero
    assert values["train/explained_variance"] == pytest.approx(0)
    assert values["train/value_loss"] == pytest.approx(np.mean(buffer.returns**2))
    assert values["train/advantage_std"] == pytest.approx(np.std(buffer.returns))
    assert values["train/entropy_loss"] == pytest.approx(-2 * 0.5 * np.log(2 * np.pi * np.e), rel=1e-4)
    assert values["train/grad_norm"] > 0
    assert_stepped_as_asked(model)
    # After the step
    assert values["train/std"] == pytest.approx(model.policy.log_std.exp().mean().item())
    assert values["train/std"] != 1
    row = read_csv(tmp_path)[0]
    assert float(row["rollout/transitions"]) == len(buffer.rewards) == model.num_timesteps
    assert float(row["rollout/episodes"]) == buffer.episode_starts.sum()
    assert float(row["rollout/idle_fraction"]) == 0
    n_episodes = int(buffer.episode_starts.sum())
    assert float(row["rollout/ep_len_mean"]) == pytest.approx(len(buffer.rewards) / n_episodes)
    # With time-outs, the buffer has more than the rewards
    returns = [info["r"] for info in model.ep_info_buffer]
    assert float(row["rollout/ep_rew_mean"]) == pytest.approx(np.mean(returns), rel=1e-4, abs=1e-5)
    assert buffer.rewards.sum() == pytest.approx(sum(returns), abs=1e-4)


@pytest.mark.parametrize("log_interval", [1, 3, None])
def test_log_interval_counts_iterations(tmp_path, log_interval):
    model = learn_and_log(tmp_path, "csv", log_interval=log_interval, total_timesteps=300)
    iterations = [int(row["time/iterations"]) for row in read_csv(tmp_path)]
    assert iterations == ([] if log_interval is None else list(range(log_interval, model._n_updates + 1, log_interval)))


def test_iterations_are_counted_from_the_beginning_of_a_run(tmp_path):
    """Over calls of ``learn()`` that go on with it, and anew when steps are."""
    model = learn_and_log(tmp_path, "csv", log_interval=2)
    n_first = model._n_updates
    model.learn(150, log_interval=2, reset_num_timesteps=False)
    n_run = model._n_updates
    model.learn(150, log_interval=2)
    n_all = model._n_updates
    assert n_first % 2 == 1 and n_first < n_run < n_all
    iterations = [int(row["time/iterations"]) for row in read_csv(tmp_path)]
    assert iterations == [*range(2, n_run + 1, 2), *range(2, n_all - n_run + 1, 2)]


def test_the_success_rate_is_that_of_the_episodes_learned_from(tmp_path):
    class Succeeds(gym.Wrapper):
        def step(self, action):
            obs, reward, terminated, truncated, info = super().step(action)
            return obs, reward, terminated, truncated, info | dict(is_success=terminated)

    successes = []

    def note(locals_):
        successes.extend(locals_["infos"][idx]["is_success"] for idx in np.flatnonzero(locals_["dones"]))

    env = DummyVecEnv([lambda: Monitor(Succeeds(RandomEnv(VECTOR, PAIR, 7)))] * 2)
    model = make_model(env=env)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(200, callback=at_each_step(note))
    rate = float(read_csv(tmp_path)[-1]["rollout/success_rate"])
    assert rate == pytest.approx(np.mean(successes[-100:]))
    assert 0 < rate < 1


def test_a_logger_that_was_given_stays(tmp_path):
    logger = configure(str(tmp_path), ["csv"])
    model = make_model(verbose=1)
    model.set_logger(logger)
    model.learn(1)
    model.learn(1, reset_num_timesteps=False)
    assert model.logger is logger


@pytest.mark.parametrize("verbose", [0, 1])
@pytest.mark.parametrize("with_tensorboard", [False, True])
def test_default_outputs_follow_verbose_and_tensorboard_log(tmp_path, capsys, verbose, with_tensorboard):
    model = make_model(verbose=verbose, tensorboard_log=str(tmp_path) if with_tensorboard else None).learn(1)
    expected = [HumanOutputFormat] * verbose + [TensorBoardOutputFormat] * with_tensorboard
    assert [type(output) for output in model.logger.output_formats] == expected
    assert ("rollout/" in capsys.readouterr().out) == bool(verbose)


@pytest.mark.parametrize("verbose", [0, 1])
def test_verbose_names_the_device_and_the_wrappers(capsys, verbose):
    make_model(env=RandomEnv(VECTOR, PAIR, 7), verbose=verbose, device="cpu")
    printed = capsys.readouterr().out
    for text in ("Using cpu device", "Wrapping the env with a `Monitor` wrapper", "Wrapping the env in a"):
        assert (text in printed) == bool(verbose), text


class HyperparametersCallback(BaseCallback):
    """From the documentation of SB3: hyperparameters for TensorBoard's own tab."""

    def _on_training_start(self):
        hparam_dict = {
            "algorithm": self.model.__class__.__name__,
            "learning rate": self.model.learning_rate,
            "gamma": self.model.gamma,
        }
        metric_dict = {"rollout/ep_len_mean": 0, "train/value_loss": 0.0}
        self.logger.record("hparams", HParam(hparam_dict, metric_dict), exclude=("stdout", "log", "json", "csv"))

    def _on_step(self):
        return True


@pytest.mark.parametrize("algorithm", [A2C, REINFORCE])
def test_the_hyperparameters_callback_of_sb3_writes_the_learning_rate(tmp_path, algorithm):
    model = algorithm("MlpPolicy", random_env(), n_steps=16, seed=0, tensorboard_log=str(tmp_path))
    model.learn(16, callback=HyperparametersCallback(), log_interval=1)
    events = EventAccumulator(str(tmp_path / f"{algorithm.__name__}_1"))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    written = HParamsPluginData.FromString(content).session_start_info.hparams
    assert written["algorithm"].string_value == algorithm.__name__
    assert (
        written["learning rate"].number_value
        == model.learning_rate
        == signature(algorithm).parameters["learning_rate"].default
    )
    assert written["gamma"].number_value == model.gamma


def test_folders_of_tensorboard_are_numbered_by_run(tmp_path):
    model = make_model(tensorboard_log=str(tmp_path))
    model.learn(1)
    model.learn(1, reset_num_timesteps=False)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"REINFORCE_1"}
    model.learn(1)
    model.learn(1, tb_log_name="other")
    model.learn(1, tb_log_name="other")
    expected = {"REINFORCE_1", "REINFORCE_2", "other_1", "other_2"}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == expected
