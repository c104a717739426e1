"""Collecting whole episodes: which ones, in what order, what callbacks see, and what happens with bad environments."""

import re
import warnings
from collections.abc import Callable
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_reinforce import REINFORCE
from tests.envs import GeometricEnv, ScriptedEnv, scripted


class Recorder(BaseCallback):
    """Keeps copies of rollouts, and of the local variables of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Any]] = []
        self.rollouts: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        names = ("rewards", "dones", "infos", "new_obs", "actions", "clipped_actions", "active")
        self.steps.append({name: self.locals[name] for name in names})
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        names = ("observations", "actions", "rewards", "episode_starts", "returns", "values", "advantages")
        logged = {name: self.model.logger.name_to_value[f"rollout/{name}"] for name in ("episodes", "idle_fraction")}
        self.rollouts.append({name: np.array(getattr(buffer, name)) for name in names} | logged)


def collect(env: VecEnv | gym.Env, n_rollouts: int = 1, **kwargs: Any) -> tuple[Recorder, REINFORCE]:
    recorder = Recorder()
    model = REINFORCE("MlpPolicy", env, **kwargs)
    for _ in range(n_rollouts):
        model.learn(1, callback=recorder, reset_num_timesteps=False)
    return recorder, model


def episodes_of(rollout: dict[str, Any]) -> list[np.ndarray]:
    return np.split(rollout["observations"], np.flatnonzero(rollout["episode_starts"])[1:])


def test_one_environment_stops_with_the_episode_that_reaches_n_steps():
    recorder, model = collect(scripted([[3]]), n_steps=7)
    (rollout,) = recorder.rollouts
    assert len(rollout["rewards"]) == model.num_timesteps == 9
    assert rollout["episodes"] == 3
    assert rollout["idle_fraction"] == 0
    np.testing.assert_array_equal(rollout["observations"][:, 2], [0, 1, 2] * 3)
    np.testing.assert_array_equal(rollout["episode_starts"], [True, False, False] * 3)


def test_an_episode_that_ends_exactly_at_n_steps_is_the_last():
    (rollout,) = collect(scripted([[3]]), n_steps=6)[0].rollouts
    assert len(rollout["rewards"]) == 6


lengths = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=50)
@given(lengths, st.integers(1, 12))
def test_every_episode_that_is_started_is_finished_and_kept_in_order(lengths_of_each: list[list[int]], n_steps: int):
    (rollout,) = collect(scripted(lengths_of_each), n_steps=n_steps)[0].rollouts
    n_envs = len(lengths_of_each)
    wanted = n_steps * n_envs
    assert len(rollout["rewards"]) >= wanted

    # What DESIGN says, played through one step at a time
    expected: list[list[list[tuple]]] = [[] for _ in range(n_envs)]
    running, episode, step, collected = [True] * n_envs, [0] * n_envs, [0] * n_envs, 0
    for env in range(n_envs):
        expected[env].append([])
    while any(running):
        collected += sum(running)
        for env in range(n_envs):
            if running[env]:
                expected[env][-1].append((env, step[env]))
                step[env] += 1
                if step[env] == lengths_of_each[env][episode[env] % len(lengths_of_each[env])]:
                    running[env] = collected < wanted
                    if running[env]:
                        expected[env].append([])
                        episode[env], step[env] = episode[env] + 1, 0
    flat = [episode for of_env in expected for episode in of_env]
    found = [[(obs[0], obs[2]) for obs in episode] for episode in episodes_of(rollout)]
    assert found == flat
    assert rollout["episodes"] == len(flat)


@settings(max_examples=30)
@given(lengths, st.integers(1, 12))
def test_n_episodes_is_the_number_of_episodes_over_all_environments(lengths_of_each: list[list[int]], n_episodes: int):
    (rollout,) = collect(scripted(lengths_of_each), n_episodes=n_episodes)[0].rollouts
    assert len(episodes_of(rollout)) == max(n_episodes, len(lengths_of_each))


def test_idle_environments_count_as_steps_and_nothing_else():
    # The second environment is idle from step 2 on, and ends two more episodes meanwhile
    env = scripted([[6], [2]])
    recorder, model = collect(env, n_steps=1)
    (rollout,) = recorder.rollouts
    assert model.num_timesteps == 12
    assert len(rollout["rewards"]) == 8
    assert rollout["idle_fraction"] == pytest.approx(4 / 12)
    assert [info["l"] for info in model.ep_info_buffer] == [2, 6]
    for number, step in enumerate(recorder.steps):
        if number >= 2:
            assert step["rewards"][1] == 0
            assert not step["dones"][1]
            assert step["infos"][1] == {}
            assert step["active"].tolist() == [True, False]


def test_episodes_of_idle_environments_are_not_counted_by_callbacks():
    callback = StopTrainingOnMaxEpisodes(max_episodes=2)
    model = REINFORCE("MlpPolicy", scripted([[6], [1]]), n_steps=1)
    model.learn(1, callback=callback)
    assert callback.n_episodes == 2


def test_the_next_rollout_starts_fresh_episodes():
    recorder, _ = collect(scripted([[6], [4]]), n_rollouts=3, n_steps=1)
    for rollout in recorder.rollouts:
        for episode in episodes_of(rollout):
            np.testing.assert_array_equal(episode[:, 2], np.arange(len(episode)))


def test_environments_at_the_start_of_an_episode_are_not_reset_again():
    """For hardware and slow simulators a reset costs something."""
    env = scripted([[3]])
    REINFORCE("MlpPolicy", env, n_steps=6).learn(24)
    # One by learn() at the very beginning, one after each of the 8 episodes
    assert env.envs[0].unwrapped.n_resets == 9


@pytest.mark.parametrize("seed", [None, 0])
def test_environments_that_others_have_stepped_between_two_calls_of_learn_start_anew(seed: int | None):
    """As the README does it: learn, evaluate on the same environment, learn on."""
    recorder = Recorder()
    model = REINFORCE("MlpPolicy", scripted([[7], [13]]), n_steps=5, seed=seed)
    for _ in range(3):
        model.learn(1, callback=recorder, reset_num_timesteps=False)
        evaluate_policy(model, model.get_env(), n_eval_episodes=3)
        model.get_env().step(np.zeros((2, 2)))
    for rollout in recorder.rollouts:
        for episode in episodes_of(rollout):
            np.testing.assert_array_equal(episode[:, 2], np.arange(len(episode)))


def test_a_seed_resets_the_environments_with_seeds_of_the_iteration():
    seeds = []

    class Spy(ScriptedEnv):
        def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
            if seed is not None:
                seeds.append(seed)
            return super().reset(seed=seed)

    for _ in range(2):
        collect(DummyVecEnv([lambda: Spy([3])]), n_rollouts=3, n_steps=6, seed=5)
    first, second = seeds[: len(seeds) // 2], seeds[len(seeds) // 2 :]
    assert first == second
    assert len(set(first)) == 4  # the seed itself before the first rollout, and one for each of three rollouts


def test_rewards_are_those_of_the_steps():
    (rollout,) = collect(scripted([[2, 3], [4]]), n_steps=3)[0].rollouts
    episode, step = rollout["observations"][:, 1], rollout["observations"][:, 2]
    np.testing.assert_array_equal(rollout["rewards"], 100 * episode + step + 1)


def test_stored_actions_are_the_unclipped_ones():
    recorder, _ = collect(scripted([[50]]), n_steps=50, seed=0, policy_kwargs=dict(log_std_init=0.0))
    (rollout,) = recorder.rollouts
    assert np.abs(rollout["actions"]).max() > 1
    np.testing.assert_array_equal(rollout["actions"], [step["actions"][0] for step in recorder.steps])
    for step in recorder.steps:
        np.testing.assert_array_equal(step["clipped_actions"], np.clip(step["actions"], -1, 1))


@pytest.mark.parametrize("policy", ["terminated", "truncated"])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_bootstrapping_adds_the_discounted_value_of_the_terminal_observation_at_time_outs_only(policy: str, bootstrap: bool):
    truncated = policy == "truncated"
    env = scripted([[4], [2]], truncated=truncated)
    raw = dict(baseline="linear", normalize_observations=False)
    recorder, model = collect(env, n_rollouts=1, n_steps=2, gamma=0.9, bootstrap_timeouts=bootstrap, **raw)
    model.policy.value_net.weight[:] = 1.0  # the value is then the sum of the observation
    model.policy.value_net.bias[:] = 0.5
    model.baseline = None  # keeps these weights
    model.learn(1, callback=recorder, reset_num_timesteps=False)
    rollout = recorder.rollouts[-1]
    env_index, episode, step = rollout["observations"].T
    expected = 100 * episode + step + 1
    if truncated and bootstrap:
        last = step + 1 == np.where(env_index == 0, 4, 2)
        expected = expected + last * 0.9 * (env_index + episode + step + 1 + 0.5)
    np.testing.assert_allclose(rollout["rewards"], expected, rtol=1e-6)


class TestEpisodesThatNeverEnd:
    def test_are_cut_and_warned_about_once_with_the_name_of_the_environment(self):
        model = REINFORCE("MlpPolicy", scripted([[None]]), n_steps=3, max_episode_steps=5)
        recorder = Recorder()
        with pytest.warns(UserWarning, match="ScriptedEnv was cut after max_episode_steps=5") as warned:
            model.learn(12, callback=recorder)
        assert len(warned) == 1
        assert [len(rollout["rewards"]) for rollout in recorder.rollouts] == [5, 5, 5]

    def test_are_cut_without_a_warning_below_a_time_limit_of_the_environment(self):
        model = REINFORCE("MlpPolicy", "Pendulum-v1", n_steps=7, max_episode_steps=7)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.learn(7)
        assert model.rollout_buffer.rewards.shape == (7,)

    def test_are_warned_about_where_others_have_a_time_limit(self):
        env = DummyVecEnv([lambda: TimeLimit(ScriptedEnv([None]), 9), lambda: ScriptedEnv([None])])
        with pytest.warns(UserWarning, match="ScriptedEnv was cut after max_episode_steps=5"):
            REINFORCE("MlpPolicy", env, n_steps=5, max_episode_steps=5).learn(1)

    def test_count_as_failures_or_successes_like_others(self):
        class Fails(ScriptedEnv):
            def step(self, action: np.ndarray) -> Any:
                *rest, info = super().step(action)
                return *rest, {**info, "is_success": self.lengths != [None]}

        env = DummyVecEnv([lambda: Monitor(Fails([None])), lambda: Monitor(Fails([5]))])
        with pytest.warns(UserWarning, match="was cut"):
            model = REINFORCE("MlpPolicy", env, n_steps=5, max_episode_steps=5).learn(1)
        assert sorted(model.ep_success_buffer) == [False, True]

    @pytest.mark.parametrize("vec_env_class", [DummyVecEnv, SubprocVecEnv])
    def test_are_in_the_statistics_with_the_rewards_of_the_monitor(self, vec_env_class: type[VecEnv]):
        env = vec_env_class([lambda length=length: Monitor(ScriptedEnv([length])) for length in (None, 3)])
        with closing(VecNormalize(env)) as env, pytest.warns(UserWarning, match="was cut after max_episode_steps=5"):
            model = REINFORCE("MlpPolicy", env, n_steps=4, max_episode_steps=5).learn(1)
        statistics = [(info["r"], info["l"]) for info in model.ep_info_buffer]
        episodes = [[100 * episode + step + 1 for step in range(steps)] for episode, steps in [(0, 3), (0, 5), (1, 3)]]
        assert statistics == [(sum(rewards), len(rewards)) for rewards in episodes]

    def test_are_collected_again_until_there_are_enough_transitions(self):
        with pytest.warns(UserWarning):
            (rollout,) = collect(scripted([[None], [3]]), n_steps=20, max_episode_steps=5)[0].rollouts
        assert len(rollout["rewards"]) >= 40
        for episode in episodes_of(rollout):
            assert len(episode) == (5 if episode[0, 0] == 0 else 3)
            np.testing.assert_array_equal(episode[:, 2], np.arange(len(episode)))

    def test_do_not_make_the_others_wait(self):
        with pytest.warns(UserWarning):
            (rollout,) = collect(scripted([[None], [3]]), n_steps=3, max_episode_steps=6)[0].rollouts
        assert [len(episode) for episode in episodes_of(rollout)] == [6, 3]

    def test_are_bootstrapped_like_time_outs(self):
        model = REINFORCE(
            "MlpPolicy", scripted([[None]]), n_steps=3, max_episode_steps=3, bootstrap_timeouts=True, gamma=0.5, baseline=None
        )
        model.policy.value_net.bias[:] = 8.0
        recorder = Recorder()
        with pytest.warns(UserWarning):
            model.learn(1, callback=recorder)
        episode = recorder.rollouts[0]["observations"][0, 1]
        np.testing.assert_allclose(recorder.rollouts[0]["rewards"], 100 * episode + np.array([1, 2, 3 + 0.5 * 8]))


def at(what: str, episode: int, step: int, value: Any) -> Callable:
    """Spoil one thing in one place."""

    def spoil(a_what: str, an_episode: int, a_step: int, a_value: Any) -> Any:
        if (a_what, an_episode, a_step) != (what, episode, step):
            return a_value
        if isinstance(value, Exception):
            raise value
        return np.full_like(a_value, value) if isinstance(a_value, np.ndarray) else value

    return spoil


class TestBadEnvironments:
    @staticmethod
    def weights(model: REINFORCE) -> np.ndarray:
        return np.concatenate([value.numpy().ravel().copy() for value in model.policy.state_dict().values()])

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize(
        ("what", "step", "place"),
        [
            ("reward", 2, "step 2 of its episode 2"),
            ("observation", 2, "step 2 of its episode 2"),
            ("terminal observation", 4, "step 4 of its episode 2"),
        ],
    )
    def test_values_that_are_not_finite_are_refused_where_they_appear(self, what: str, step: int, place: str, value: float):
        spoilt = at(what, 2, step, value)
        # Episode 0 ends with the reset of the rollout: the first of the rollout has number 1 here
        envs = [ScriptedEnv([4]), ScriptedEnv([4], spoil=spoilt)]
        vec_env = DummyVecEnv([lambda: envs[0], lambda: envs[1]])
        # The default schedule is at 0 when the only update is made
        model = REINFORCE("MlpPolicy", vec_env, n_steps=8, seed=0, learning_rate=1e-3)
        before = self.weights(model)
        with pytest.raises(ValueError, match=f"Environment 1 returned the {what} .*(nan|inf).* at {place}"):
            model.learn(16)
        np.testing.assert_array_equal(self.weights(model), before)
        envs[1].spoil = lambda what, episode, step, value: value
        model.learn(16)
        assert not np.array_equal(self.weights(model), before)

    def test_a_reset_that_returns_nan_is_refused(self):
        env = ScriptedEnv([4], spoil=at("observation", 1, 0, np.nan))
        with pytest.raises(ValueError, match=r"Environment 0 returned the observation .*nan"):
            REINFORCE("MlpPolicy", env, n_steps=8, seed=0).learn(16)

    @pytest.mark.parametrize("seed", [None, 0])
    def test_a_step_that_raises_is_named(self, seed: int | None):
        error = OSError("lost the robot")
        envs = [ScriptedEnv([4]), ScriptedEnv([4], spoil=at("reward", 1, 3, error))]
        vec_env = DummyVecEnv([lambda: envs[0], lambda: envs[1]])
        model = REINFORCE("MlpPolicy", vec_env, n_steps=8, seed=seed, learning_rate=1e-3)
        envs[1].episode += seed is None  # a seeded model resets once more
        before = self.weights(model)
        with pytest.raises(
            RuntimeError, match=r"Environment 1 raised OSError in step\(\) at step 3 .*lost the robot"
        ) as raised:
            model.learn(16)
        assert raised.value.__cause__ is error
        np.testing.assert_array_equal(self.weights(model), before)
        model.learn(16)
        assert not np.array_equal(self.weights(model), before)

    @pytest.mark.parametrize("episode", [0, 1])
    def test_a_reset_that_raises_is_named(self, episode: int):
        env = ScriptedEnv([4], spoil=at("observation", episode, 0, OSError("no robot")))
        with pytest.raises(RuntimeError, match=r"Environment 0 raised OSError .*no robot"):
            REINFORCE("MlpPolicy", env, n_steps=8).learn(16)

    def test_a_worker_process_that_dies_is_named(self):
        fns = [lambda: ScriptedEnv([4]), lambda: ScriptedEnv([4], spoil=at("reward", 1, 2, OSError("lost")))]
        env = SubprocVecEnv(fns)
        with pytest.raises(RuntimeError, match="Environment 1 raised"):
            REINFORCE("MlpPolicy", env, n_steps=8).learn(16)
        env.processes[0].terminate()

    def test_errors_of_callbacks_are_left_alone(self):
        def callback(locals_: dict, globals_: dict) -> bool:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            REINFORCE("MlpPolicy", scripted([[4]]), n_steps=8).learn(16, callback=callback)

    def test_a_policy_that_returns_nan_is_refused_before_the_environment_sees_it(self):
        for action_space in (spaces.Box(-1, 1, (2,)), spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)):
            env = ScriptedEnv([4])
            env.action_space = action_space
            model = REINFORCE("MlpPolicy", env, n_steps=8)
            model.policy.action_net.bias.data[0] = np.nan
            with pytest.raises(ValueError, match=r"(?s)policy's output is not finite.*nan"):
                model.learn(16)
            assert env.steps == 0


def test_a_callback_may_stop_within_an_episode_and_learning_goes_on_with_whole_episodes():
    env = scripted([[5], [3]])
    model = REINFORCE("MlpPolicy", env, n_steps=6, seed=0)
    model.learn(100, callback=lambda locals_, globals_: locals_["n_steps"] < 4)
    assert model._n_updates == 0
    recorder = Recorder()
    model.learn(1, callback=recorder, reset_num_timesteps=False)
    assert model._n_updates == 1
    for episode in episodes_of(recorder.rollouts[0]):
        np.testing.assert_array_equal(episode[:, 2], np.arange(len(episode)))


def test_a_rollout_that_was_interrupted_is_collected_again_as_if_it_had_never_been_started():
    def learn(interrupt: bool) -> np.ndarray:
        model = REINFORCE("MlpPolicy", DummyVecEnv([GeometricEnv, GeometricEnv]), n_steps=20, seed=0)
        if interrupt:
            model.learn(100, callback=lambda locals_, globals_: locals_["n_steps"] < 4)
        recorder = Recorder()
        model.learn(1, callback=recorder, reset_num_timesteps=False)
        return recorder.rollouts[0]["actions"]

    np.testing.assert_array_equal(learn(interrupt=True), learn(interrupt=False))


def test_monitors_that_forbid_early_resets_work_with_one_environment():
    env = Monitor(ScriptedEnv([3]), allow_early_resets=False)
    REINFORCE("MlpPolicy", env, n_steps=6).learn(18)


def geometric_rollouts(n_rollouts: int) -> list[dict[str, Any]]:
    """Rollouts of 8 environments that are short in comparison to their episodes, where a bias would be large."""
    recorder = Recorder()
    env = DummyVecEnv([GeometricEnv for _ in range(8)])
    model = REINFORCE("MlpPolicy", env, n_steps=4, learning_rate=0.0, seed=0)
    while len(recorder.rollouts) < n_rollouts:
        model.learn(1, callback=recorder, reset_num_timesteps=False)
    return recorder.rollouts


def z_score_of_mean_return(batches: list[np.ndarray], true_mean: float) -> float:
    """By how many standard errors total return over total episodes is off, with batches as the independent units."""
    sums, counts = np.array([batch.sum() for batch in batches]), np.array([len(batch) for batch in batches])
    ratio = sums.sum() / counts.sum()
    residuals = sums - ratio * counts
    return (ratio - true_mean) / (residuals.std(ddof=1) * len(batches) ** 0.5 / counts.sum())


def test_batches_of_several_environments_are_not_biased_towards_short_episodes():
    """
    Statistical, with a fixed seed. The length of an episode is its return, with mean 1 / p = 5. The mean over all batches must
    be that; it is far from it for a collector that stops at n_steps and drops the episodes that are not over by then.
    """
    rollouts = geometric_rollouts(400)
    kept, dropping = [], []
    for rollout in rollouts:
        lengths = np.array([len(episode) for episode in episodes_of(rollout)])
        kept.append(lengths)
        # 8 environments in order, each with episodes up to the first that ends at or after step 4
        ends, env_lengths = 0, []
        finished_in_time = []
        for length in lengths:
            ends += length
            env_lengths.append(length)
            if ends <= 4:
                finished_in_time.append(length)
            if ends >= 4:
                ends, env_lengths = 0, []
        dropping.append(np.array(finished_in_time))
    assert abs(z_score_of_mean_return(kept, 5.0)) < 3
    assert z_score_of_mean_return(dropping, 5.0) < -10


def test_messages_name_a_key_of_a_dictionary_observation():
    class DictEnv(ScriptedEnv):
        observation_space = spaces.Dict({"a": spaces.Box(-np.inf, np.inf, (3,)), "b": spaces.Discrete(2)})

        def _observation(self) -> Any:
            value = super()._observation()
            return {"a": value * np.nan if self.steps == 2 else value, "b": 0}

    with pytest.raises(ValueError, match=re.escape("Environment 0 returned the observation under 'a' [nan, nan, nan]")):
        REINFORCE("MultiInputPolicy", DictEnv([4]), n_steps=8).learn(8)
