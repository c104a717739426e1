"""``EpisodeVecEnv``: a ``DummyVecEnv`` in every respect but idle environments; and what is made of the user's environment."""

import csv
import warnings
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes.schedule import EpisodeSchedule, episode_seed
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv
from tests.envs import RandomEnv, RandomLengthEnv, ScriptedEnv, Simulators, subproc

VECTOR = spaces.Box(-1, 1, (3,))
IMAGE = spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)
#: A policy that is made in no time
SMALL: dict[str, Any] = dict(policy_kwargs=dict(net_arch=[]), baseline=None)


def same(one: Any, other: Any) -> bool:
    """Equal in value, type and structure, all the way down; times of the monitors aside."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(key == "t" or same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


def both(make: Callable[[], gym.Env], n_envs: int) -> tuple[EpisodeVecEnv, DummyVecEnv]:
    return EpisodeVecEnv([make for _ in range(n_envs)]), DummyVecEnv([make for _ in range(n_envs)])


# Stepped by others -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize(
    "space", [VECTOR, IMAGE, spaces.Discrete(3), spaces.MultiBinary(2), spaces.Dict({"v": VECTOR, "d": spaces.Discrete(3)})]
)
def test_returns_what_dummy_vec_env_returns(space: spaces.Space, n_envs: int):
    mine, theirs = both(lambda: Monitor(RandomEnv(space, spaces.Discrete(2), 4)), n_envs)
    for env in (mine, theirs):
        env.seed(3)
    assert same(mine.reset(), theirs.reset())
    actions = np.zeros(n_envs, dtype=int)
    for _ in range(40):
        assert same(mine.step(actions), theirs.step(actions))
        assert same(mine.reset_infos, theirs.reset_infos)
        assert same(mine.buf_infos, theirs.buf_infos)


class Recycling(ScriptedEnv):
    """Returns the same objects again and again."""

    def __init__(self) -> None:
        super().__init__([5])
        self.array = np.zeros(3, dtype=np.float32)
        self.info: dict[str, Any] = {"array": self.array, "list": [0], "nested": {"n": [0]}, "number": 0}

    def step(self, action: np.ndarray) -> Any:
        _, reward, *ends, _ = super().step(action)
        self.array += 1
        self.info["list"][0] += 1
        self.info["nested"]["n"][0] += 1
        self.info["number"] += 1
        return self.array, reward, *ends, self.info


def test_what_was_returned_stays_as_it_is():
    mine, theirs = both(Recycling, 2)
    actions = np.zeros((2, 2))
    for env in (mine, theirs):
        env.reset()
    returned = [(mine.step(actions), theirs.step(actions)) for _ in range(12)]
    for one, other in returned:
        assert same(one, other)
    assert returned[0][0][3][0]["nested"] == {"n": [1]}


def test_a2c_learns_the_same_as_on_dummy_vec_env():
    weights = []
    for cls in (EpisodeVecEnv, DummyVecEnv):
        model = A2C("MlpPolicy", cls([lambda: Monitor(RandomLengthEnv(9)) for _ in range(3)]), seed=0).learn(150)
        weights.append((model.policy.parameters_to_vector(), [(info["r"], info["l"]) for info in model.ep_info_buffer]))
    np.testing.assert_array_equal(weights[0][0], weights[1][0])
    assert weights[0][1] == weights[1][1]


def test_an_evaluation_is_the_same_as_on_dummy_vec_env():
    model = A2C("MlpPolicy", RandomLengthEnv(9), seed=0)
    results = []
    for env in both(lambda: Monitor(RandomLengthEnv(9)), 3):
        env.seed(5)
        results.append(evaluate_policy(model, env, n_eval_episodes=10, return_episode_rewards=True))
    assert results[0] == results[1]
    assert len(set(results[0][1])) > 1


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_it_is_a_dummy_vec_env_again_after_a_rollout_that_was_interrupted(error: type[BaseException] | None):
    def interrupt(locals_: dict, globals_: dict) -> bool:
        if locals_["n_steps"] == 3 and error is not None:
            raise error
        return bool(locals_["n_steps"] < 3)

    mine, theirs = both(lambda: RandomLengthEnv(5), 3)
    with nullcontext() if error is None else pytest.raises(error):
        REINFORCE("MlpPolicy", mine, n_steps=10, seed=0, **SMALL).learn(1, callback=interrupt)
    for env in (mine, theirs):
        env.seed(3)
    assert same(mine.reset(), theirs.reset())
    for _ in range(20):
        assert same(mine.step(np.zeros((3, 2))), theirs.step(np.zeros((3, 2))))


# Schedules -------------------------------------------------------------------------------------------------------------------


def test_seeds_of_episodes_are_31_bits_and_differ():
    seeds = [episode_seed(seed, number) for seed in range(20) for number in range(200)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) == len(seeds)
    # As spread as uniform numbers: five standard errors
    assert abs(np.mean(seeds) / 2**31 - 0.5) < 5 / np.sqrt(12 * len(seeds))


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from(["start", "step"]), st.integers(0, 3)), max_size=40),
    st.integers(0, 12),
    st.integers(0, 5),
)
def test_a_schedule_counts_what_is_started_and_stepped(events: list, min_transitions: int, min_episodes: int):
    """Ends of episodes in any order, whatever environments they are of."""
    schedule = EpisodeSchedule(4, min_transitions, min_episodes, next_number=5, seed=1)
    schedule.begin(np.array([True, True, False, True]))
    n_started, n_transitions, active = 3, 0, {0, 1, 3}
    for _, env_idx in events:
        schedule.begin_step()
        n_transitions += len(active)
        wants_more = n_transitions < min_transitions or n_started < min_episodes
        assert schedule.wants_more() == wants_more
        assert schedule.end_episode(env_idx) == wants_more
        if wants_more:
            assert schedule.seeds[env_idx] == episode_seed(1, 5 + n_started)
            assert schedule.numbers[env_idx] == 5 + n_started
        n_started += wants_more
        active = active | {env_idx} if wants_more else active - {env_idx}
        assert set(schedule.active.nonzero()[0].tolist()) == active
        assert (schedule.n_active, schedule.n_started, schedule.n_transitions) == (len(active), n_started, n_transitions)
        assert schedule.next_number == 5 + n_started


# Stepped by REINFORCE --------------------------------------------------------------------------------------------------------


class Informative(ScriptedEnv):
    """Has a key in every info that counts the steps of the environment, and another one now and then."""

    def step(self, action: np.ndarray) -> Any:
        *rest, info = super().step(action)
        return *rest, info | {"drag": float(sum(self.lengths_run)), "nested": {"list": [self.steps]}}


def two_informative(truncated: bool = False) -> list[Callable[[], gym.Env]]:
    """The second goes idle first."""
    return [lambda length=length: Monitor(Informative([length], truncated=truncated)) for length in (6, 2)]


class Infos(BaseCallback):
    """As in SB3 issue 1437: look at every info, returned and kept, at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        names = ("active", "rewards", "dones", "infos", "new_obs")
        env: Any = self.training_env.unwrapped
        self.logger.record("env/drag", np.mean([info["drag"] for info in self.locals["infos"]]))
        self.logger.record("env/kept", np.mean([info["drag"] for info in env.buf_infos]))
        kept = [set(info) for info in env.buf_infos]
        self.seen.append({name: self.locals[name] for name in names} | {"kept": kept})
        return True


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("make", [EpisodeVecEnv, DummyVecEnv])
def test_idle_environments_are_not_stepped_and_their_infos_mark_no_end(make: Callable[[list], VecEnv], truncated: bool):
    env = make(two_informative(truncated))
    callback = Infos()
    model = REINFORCE("MlpPolicy", env, n_steps=1, **SMALL).learn(1, callback=callback)
    assert model.num_timesteps == 8
    assert model.logger.name_to_value["rollout/idle_fraction"] == 0
    assert [sum(env.unwrapped.lengths_run) for env in env.envs] == [6, 2]  # type: ignore[attr-defined]
    assert [env.unwrapped.n_resets for env in env.envs] == [1, 1]  # type: ignore[attr-defined]
    assert len(callback.seen) == 6
    for step, seen in enumerate(callback.seen, start=1):
        info = seen["infos"][1]
        np.testing.assert_array_equal(seen["new_obs"], [[0, 0, step], [0, 0, min(step, 2)]])
        if step <= 2:
            assert seen["active"].tolist() == [True, True]
            assert (seen["rewards"][1], seen["dones"][1]) == (step, step == 2)
            assert info["TimeLimit.truncated"] is (truncated and step == 2)
        else:
            assert seen["active"].tolist() == [True, False]
            assert (seen["rewards"][1], seen["dones"][1]) == (0, False)
            assert info == {"drag": 2, "nested": {"list": [2]}, "TimeLimit.truncated": False}
        # DummyVecEnv keeps the infos of the latest step that there was
        keys = {"drag", "nested", "TimeLimit.truncated"}
        assert seen["kept"][1] == (keys if step == 1 else keys | {"episode", "terminal_observation"})
    assert [(info["l"], info["r"]) for info in model.ep_info_buffer] == [(2, 3), (6, 21)]


def test_infos_of_idle_environments_are_copies():
    class Spoil(Infos):
        def _on_step(self) -> bool:
            if self.n_calls > 2:
                assert self.locals["infos"][1]["nested"] == {"list": [2]}
                self.locals["infos"][1]["nested"]["list"][0] = -1
            return True

    REINFORCE("MlpPolicy", EpisodeVecEnv(two_informative()), n_steps=1, **SMALL).learn(1, callback=Spoil())


def test_observations_of_dictionaries_stay_those_of_the_last_step_while_idle():
    space = spaces.Dict(v=VECTOR, d=spaces.Discrete(5))

    class Lengths(RandomEnv):
        def reset(self, **kwargs: Any) -> tuple[Any, dict]:
            observation, info = super().reset(**kwargs)
            self.remaining = self.max_length
            return observation, info

    env = EpisodeVecEnv([lambda length=length: Lengths(space, spaces.Discrete(2), length) for length in (5, 2)])
    seen = []

    def callback(locals_: dict, globals_: dict) -> bool:
        seen.append(locals_["new_obs"])
        return True

    REINFORCE("MultiInputPolicy", env, n_steps=1, **SMALL).learn(1, callback=callback)
    for later in seen[2:]:
        for key in space:
            np.testing.assert_array_equal(later[key][1], seen[1][key][1])
    assert not np.array_equal(seen[2]["v"][0], seen[1]["v"][0])


def test_begin_episodes_resets_what_is_not_at_the_start_of_the_right_episode():
    env = EpisodeVecEnv([lambda index=index: ScriptedEnv([3], index) for index in range(3)])
    env.seed_episodes([episode_seed(0, 0), episode_seed(0, 5), episode_seed(0, 2)])
    env.reset()
    schedule = EpisodeSchedule(3, 1, 0, seed=0)
    schedule.begin(np.ones(3, dtype=bool))
    env.begin_episodes(schedule)
    assert [env_.n_resets for env_ in env.envs] == [1, 2, 1]
    assert [env_.seeds[-1] for env_ in env.envs] == [episode_seed(0, number) for number in range(3)]


# Monitors --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("make", [DummyVecEnv, EpisodeVecEnv, subproc, lambda fns: VecNormalize(EpisodeVecEnv(fns))])
def test_monitors_that_forbid_early_resets_raise_nothing(make: Callable[[list], VecEnv], n_envs: int):
    env = make([lambda: Monitor(RandomLengthEnv(9), allow_early_resets=False) for _ in range(n_envs)])
    with closing(env):
        model = REINFORCE("MlpPolicy", env, n_steps=6, seed=0, **SMALL).learn(60)
        model.learn(60, reset_num_timesteps=False)
    assert model._n_updates >= 4


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("make", [DummyVecEnv, EpisodeVecEnv])
def test_monitors_that_forbid_early_resets_allow_learn_to_be_called_again(make: Callable[[list], VecEnv], seed: int | None):
    env = make([lambda: Monitor(RandomLengthEnv(9), allow_early_resets=False) for _ in range(3)])
    model = REINFORCE("MlpPolicy", env, n_steps=6, seed=seed, **SMALL)
    for _ in range(3):
        model.learn(30)


@pytest.mark.parametrize("make", [DummyVecEnv, EpisodeVecEnv])
def test_monitor_files_hold_exactly_the_episodes_of_the_batches(make: Callable[[list], VecEnv], tmp_path: Path):
    env = make([lambda i=i: Monitor(ScriptedEnv([[7, 1], [3], [2, 5]][i], i), str(tmp_path / f"{i}")) for i in range(3)])
    learned: list[list[tuple[int, float]]] = [[], [], []]

    class Learned(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            buffer = self.model.rollout_buffer
            starts = np.flatnonzero(buffer.episode_starts)
            for start, end in zip(starts, [*starts[1:], len(buffer.rewards)], strict=True):
                learned[int(buffer.observations[start, 0])].append((end - start, buffer.rewards[start:end].sum()))

    with closing(env):
        model = REINFORCE("MlpPolicy", env, n_steps=5, seed=0, **SMALL)
        for _ in range(3):
            model.learn(40, callback=Learned())
    for index in range(3):
        with open(tmp_path / f"{index}.monitor.csv") as file:
            next(file)
            written = [(int(row["l"]), float(row["r"])) for row in csv.DictReader(file)]
        assert written == learned[index]
        assert len(written) > 3


# What is made of the user's environment --------------------------------------------------------------------------------------


def test_single_environments_functions_and_names_become_an_episode_vec_env_of_one():
    model = REINFORCE("MlpPolicy", "CartPole-v1", **SMALL)
    spec = gym.spec("CartPole-v1")
    for source in ("CartPole-v1", spec, gym.make("CartPole-v1"), lambda: gym.make("CartPole-v1")):
        model.set_env(source)
        for env in (REINFORCE("MlpPolicy", source, **SMALL).get_env(), model.get_env()):
            assert type(env) is EpisodeVecEnv and env.num_envs == 1
            assert env.env_is_wrapped(Monitor) == [True]
            assert env.get_attr("render_mode") == [None]


def test_an_environment_with_a_monitor_gets_no_other():
    env = gym.wrappers.RescaleAction(Monitor(ScriptedEnv([3])), -2, 2)
    assert REINFORCE("MlpPolicy", env, **SMALL).get_env().envs == [env]


def test_a_dummy_vec_env_is_taken_over_with_its_environments():
    dummy = DummyVecEnv([lambda: ScriptedEnv([3]), lambda: ScriptedEnv([4])])
    model = REINFORCE("MlpPolicy", dummy, n_steps=5, **SMALL)
    env = model.get_env()
    assert type(env) is EpisodeVecEnv
    assert env.envs is dummy.envs
    model.set_env(DummyVecEnv([lambda: ScriptedEnv([3]), lambda: ScriptedEnv([4])]))
    assert type(model.get_env()) is EpisodeVecEnv
    loaded = REINFORCE("MlpPolicy", dummy, n_steps=5, **SMALL)
    assert loaded.get_env().envs is dummy.envs
    loaded.learn(20)
    assert [env.n_resets for env in dummy.envs] > [1, 1]


def test_a_subclass_of_dummy_vec_env_is_not_taken_over():
    class Own(DummyVecEnv):
        n_steps = 0

        def step_wait(self) -> Any:
            self.n_steps += 1
            return super().step_wait()

    env = Own([lambda: ScriptedEnv([6]), lambda: ScriptedEnv([2])])
    model = REINFORCE("MlpPolicy", env, n_steps=1, **SMALL).learn(1)
    assert model.get_env() is env
    assert env.n_steps == 6
    # The idle environment was stepped along
    assert model.num_timesteps == 12


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("seed", [None, 0])
def test_options_reach_the_first_reset_of_each_environment_once(seed: int | None, when: str):
    dummy = DummyVecEnv([lambda: ScriptedEnv([3]), lambda: ScriptedEnv([3])])
    if when == "before":
        dummy.set_options({"level": 1})
    model = REINFORCE("MlpPolicy", dummy, n_steps=6, seed=seed, **SMALL)
    if when == "after":
        model.get_env().set_options([{"level": 1}, {"level": 1}])
    model.learn(1)
    assert [env.options for env in dummy.envs] == [[{"level": 1}, None]] * 2
    # Set between two calls of learn(), for one of the environments
    dummy.set_options([{"level": 2}, {}])
    model.learn(1, reset_num_timesteps=False)
    model.learn(1, reset_num_timesteps=False)
    assert [env.options[2:] for env in dummy.envs] == [[{"level": 2}, None, None, None], [None] * 4]


def test_seeds_of_the_user_reach_the_first_reset_of_an_unseeded_model():
    dummy = DummyVecEnv([lambda: ScriptedEnv([3]), lambda: ScriptedEnv([3])])
    dummy.seed(7)
    REINFORCE("MlpPolicy", dummy, n_steps=6, **SMALL).learn(1)
    assert [env.seeds for env in dummy.envs] == [[7, None], [8, None]]


# max_episode_steps -----------------------------------------------------------------------------------------------------------


class Ends(BaseCallback):
    """The infos of the ends of episodes."""

    def __init__(self) -> None:
        super().__init__()
        self.infos: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.infos += [info for info, done in zip(self.locals["infos"], self.locals["dones"], strict=True) if done]
        return True


SOURCES: dict[str, Callable[[], Any]] = {
    "id": lambda: "Pendulum-v1",
    "spec": lambda: gym.spec("Pendulum-v1"),
    "function": lambda: lambda: gym.make("Pendulum-v1"),
    "environment": lambda: gym.make("Pendulum-v1"),
    "monitored environment": lambda: Monitor(gym.make("Pendulum-v1")),
    "wrapper around a monitored environment": lambda: gym.wrappers.TransformReward(
        Monitor(gym.make("Pendulum-v1")), lambda reward: reward
    ),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("how", ["constructor", "set_env", "load"])
def test_max_episode_steps_is_a_time_limit_that_the_monitor_sees(how: str, source: str, tmp_path: Path):
    kwargs: dict[str, Any] = dict(n_steps=20, max_episode_steps=7, bootstrap_timeouts=False, seed=0, **SMALL)
    if how == "constructor":
        model = REINFORCE("MlpPolicy", SOURCES[source](), **kwargs)
    else:
        model = REINFORCE("MlpPolicy", "Pendulum-v1", **kwargs)
        if how == "set_env":
            model.set_env(SOURCES[source]())
        else:
            model.save(tmp_path / "model")
            model = REINFORCE.load(tmp_path / "model", env=SOURCES[source]())
    ends = Ends()
    model.learn(1, callback=ends)
    buffer = model.rollout_buffer
    assert np.flatnonzero(buffer.episode_starts).tolist() == [0, 7, 14]
    returns = buffer.rewards.reshape(3, 7).sum(axis=1)
    assert [info["l"] for info in model.ep_info_buffer] == [7, 7, 7]
    np.testing.assert_allclose([info["r"] for info in model.ep_info_buffer], returns, rtol=1e-5, atol=1e-4)
    assert len(ends.infos) == 3
    for info in ends.infos:
        assert info["TimeLimit.truncated"] is True
        assert info["terminal_observation"].shape == (3,)


def test_a_time_limit_of_the_environment_that_is_shorter_stays():
    env = TimeLimit(ScriptedEnv([None]), 4)
    model = REINFORCE("MlpPolicy", env, n_steps=20, max_episode_steps=7, **SMALL).learn(1)
    assert {info["l"] for info in model.ep_info_buffer} == {4}


def test_episodes_that_end_before_max_episode_steps_are_not_truncated():
    ends = Ends()
    REINFORCE("MlpPolicy", ScriptedEnv([7, 3]), n_steps=20, max_episode_steps=7, **SMALL).learn(1, callback=ends)
    assert [info["TimeLimit.truncated"] for info in ends.infos] == [False] * len(ends.infos)
    assert [info["episode"]["l"] for info in ends.infos][:2] == [7, 3]


def test_time_outs_of_max_episode_steps_are_bootstrapped():
    kwargs: dict[str, Any] = dict(baseline="linear", normalize_observations=False)
    model = REINFORCE("MlpPolicy", ScriptedEnv([None]), n_steps=3, max_episode_steps=3, gamma=0.5, **kwargs)
    model.policy.value_net.bias.fill_(8.0)
    model.learn(1)
    np.testing.assert_allclose(model.rollout_buffer.rewards, [1, 2, 3 + 0.5 * 8])


VEC_ENVS: dict[str, Callable[[], VecEnv]] = {
    "DummyVecEnv": lambda: DummyVecEnv([lambda: ScriptedEnv([3])]),
    "EpisodeVecEnv": lambda: EpisodeVecEnv([lambda: ScriptedEnv([3])]),
    "VecNormalize": lambda: VecNormalize(DummyVecEnv([lambda: ScriptedEnv([3])])),
    "Simulators": lambda: Simulators([[3]]),
}


@pytest.mark.parametrize("name", VEC_ENVS)
@pytest.mark.parametrize("how", ["constructor", "set_env", "load"])
def test_max_episode_steps_is_refused_with_a_vec_env(how: str, name: str, tmp_path: Path):
    kwargs: dict[str, Any] = dict(max_episode_steps=7, **SMALL)
    env = VEC_ENVS[name]()
    message = f"max_episode_steps=7 cannot be put around the environments of a {name}: .*env_kwargs="
    if how == "constructor":
        with pytest.raises(ValueError, match=message):
            REINFORCE("MlpPolicy", env, **kwargs)
        return
    model = REINFORCE("MlpPolicy", ScriptedEnv([3]), **kwargs)
    before = model.get_env()
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        model.set_env(env) if how == "set_env" else REINFORCE.load(tmp_path / "model", env=env)
    assert model.get_env() is before
    # Without it, the model takes what it is given
    assert REINFORCE.load(tmp_path / "model", env=env, max_episode_steps=None).learn(1)._n_updates == 1


def test_a_model_with_max_episode_steps_can_be_loaded_with_its_own_environment(tmp_path: Path):
    model = REINFORCE("MlpPolicy", ScriptedEnv([None]), n_steps=10, max_episode_steps=5, seed=0, **SMALL).learn(1)
    model.save(tmp_path / "model")
    loaded = REINFORCE.load(tmp_path / "model", env=model.get_env())
    assert loaded.get_env() is model.get_env()
    loaded.learn(1)
    assert {info["l"] for info in loaded.ep_info_buffer} == {5}
    model.set_env(model.get_env())
    with pytest.raises(ValueError, match="max_episode_steps=6 cannot be put around"):
        REINFORCE.load(tmp_path / "model", env=model.get_env(), max_episode_steps=6)


def test_make_vec_env_limits_episodes_as_the_message_says():
    env = make_vec_env("Pendulum-v1", n_envs=2, env_kwargs={"max_episode_steps": 5})
    model = REINFORCE("MlpPolicy", env, n_steps=10, **SMALL).learn(1)
    assert {info["l"] for info in model.ep_info_buffer} == {5}


@pytest.mark.parametrize("n_envs", [1, 3])
def test_others_can_step_the_environments_after_learn(n_envs: int):
    """A2C goes on where REINFORCE has left every environment at the end of an episode."""
    env = DummyVecEnv([lambda: Monitor(ScriptedEnv([4, 6]))] * n_envs)
    a2c = A2C("MlpPolicy", env, n_steps=7).learn(20)
    model = REINFORCE("MlpPolicy", env, n_steps=10).learn(20)
    resets = [member.unwrapped.n_resets for member in env.envs]
    env.step(np.zeros((n_envs, 2)))
    assert [member.unwrapped.n_resets for member in env.envs] == [n + 1 for n in resets]
    a2c.learn(20, reset_num_timesteps=False)
    model.learn(20, reset_num_timesteps=False)
    assert {info["l"] for info in model.ep_info_buffer} <= {4, 6}


def test_max_episode_steps_leaves_the_monitor_of_the_user_alone():
    monitor = Monitor(ScriptedEnv([60]))
    for limit, length in ((10, 10), (30, 30), (None, 60)):
        model = REINFORCE("MlpPolicy", monitor, n_steps=60, max_episode_steps=limit).learn(60)
        assert {info["l"] for info in model.ep_info_buffer} == {length}


@pytest.mark.parametrize("reward", [np.float16(2), np.float32(2), 2, True])
def test_rewards_of_any_type_are_taken_without_a_warning(reward: Any):
    env = EpisodeVecEnv([lambda: ScriptedEnv([4], spoil=lambda what, *_: reward if what == "reward" else _[-1])])
    env.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert env.step(np.zeros((1, 2)))[1] == float(reward)


# With workers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda env: env.set_attr("difficulty", 3),
        lambda env: env.env_method("reset"),
        lambda env: env.set_options({"difficulty": 3}),
    ],
)
def test_what_would_not_reach_workers_is_refused(change: Callable[[VecEnv], Any]):
    """Until the environment, or another one, is given to a model without them."""
    model = REINFORCE("MlpPolicy", lambda: RandomLengthEnv(9), workers=2, **SMALL)
    assert model.env is not None
    with pytest.raises(
        RuntimeError, match=r"\(\) would change nothing: the episodes run in workers.* model.set_env\(\) a func"
    ):
        change(model.env)
    assert model.env.get_attr("spec") == [None]
    evaluate_policy(model, model.env, n_eval_episodes=1)
    REINFORCE("MlpPolicy", model.env, **SMALL)
    change(model.env)
