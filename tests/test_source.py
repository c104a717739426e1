"""``EpisodeSource``: any ``VecEnv`` runs whole episodes, and errors say where they were raised."""

import traceback
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn

from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes import source
from sb3_reinforce.episodes.schedule import episode_seed
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv
from tests.envs import OwnVecEnv, ScriptedEnv, Simulators, scripted, subproc
from tests.rollouts import (
    LONG,
    SMALL,
    USES,
    WRAPPERS,
    Do,
    Recorder,
    Reference,
    check_whole,
    episode_vec_env,
    episodes_of,
    lengths,
    spoil_at,
    state_of,
    targets,
)

DTYPES = [(np.float32, bool), (np.float64, np.uint8), (int, float)]

# Any VecEnv ------------------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(lengths, targets, st.integers(1, 3), st.lists(st.integers(0, 4), min_size=1, max_size=2), st.sampled_from(DTYPES))
def test_simulators_that_reset_themselves_are_reset_once_and_run_whole_episodes(
    lengths_of_each: list[list[int]], target: dict[str, int], n_rollouts: int, steps_between: list[int], dtypes: Any
):
    """Others step the simulators between two calls of learn(); rewards and dones may have any type."""
    env, expected = Simulators(lengths_of_each, dtypes), Reference(lengths_of_each, steps_idle_envs=True)
    model = REINFORCE("MlpPolicy", env, **(SMALL | target))
    at_start = [True] * env.num_envs
    for n_between in steps_between:
        recorder, n_timesteps = Recorder(n_rollouts), model.num_timesteps
        model.learn(LONG, callback=recorder, reset_num_timesteps=False)
        steps = iter(recorder.steps)
        for rollout in recorder.rollouts:
            episodes, activity, at_start = expected.rollout(at_start, **target)
            assert [tuple(e[0, :2]) for e in episodes_of(rollout)] == [episode[:2] for episode in episodes]
            assert rollout["idle_fraction"] == pytest.approx(1 - np.sum(activity) / np.size(activity))
            n_timesteps += env.num_envs * len(activity)
            assert rollout["num_timesteps"] == n_timesteps
            for active in activity:
                check_idle(next(steps), active)
        check_whole(recorder.rollouts)
        for _ in range(n_between):
            env.step(np.zeros((env.num_envs, 2)))
            expected.step()
        at_start = [False] * env.num_envs
    assert env.n_resets == 1


def check_idle(seen: dict[str, Any], active: list[bool]) -> None:
    """Check that callbacks see no rewards and no ends of episodes of idle sub-environments."""
    assert seen["active"].tolist() == active
    assert (seen["rewards"] > 0).tolist() == active
    assert not (seen["dones"] & ~seen["active"]).any()
    assert seen["rewards"].dtype == np.float32 and seen["dones"].dtype == bool
    for index, (info, done) in enumerate(zip(seen["infos"], seen["dones"], strict=True)):
        assert info["key"] == (index if active[index] else 0)
        assert ("episode" in info, "terminal_observation" in info) == (done, done)


@settings(max_examples=20)
@given(lengths, targets, st.sampled_from(list(WRAPPERS)), st.sampled_from([None, 3]))
def test_a_wrapped_episode_vec_env_is_reset_once_per_episode_with_its_seed(
    lengths_of_each: list[list[int]], target: dict[str, int], wrapper: str, seed: int | None
):
    env = episode_vec_env(lengths_of_each)
    model, recorder = REINFORCE("MlpPolicy", WRAPPERS[wrapper](env), seed=seed, **(SMALL | target)), Recorder(3)
    model.learn(LONG, callback=recorder)
    envs: list[Any] = env.envs
    next_number = 0
    for rollout in recorder.rollouts:
        starts = [episode[0, -3:].astype(int) for episode in episodes_of(rollout)]
        expected = [None if seed is None else episode_seed(seed, next_number + n) for n in range(len(starts))]
        assert sorted((envs[index].seeds[episode] for index, episode, _ in starts), key=str) == sorted(expected, key=str)
        next_number += len(starts)
        if len(envs) == 1:
            assert rollout["idle_fraction"] == 0
    check_whole(recorder.rollouts)
    for env_ in envs:
        assert env_.lengths_run[:-1] == [env_.lengths[e % len(env_.lengths)] for e in range(env_.n_resets - 1)]


# The environment is used by others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "use", "at_step"),
    [
        ("DummyVecEnv", "evaluate_policy", 1),
        ("DummyVecEnv", "reset", 7),
        ("EpisodeVecEnv", "step", 7),
        ("VecNormalize", "step", 1),
        ("VecNormalize", "reset", 7),
    ],
)
def test_using_the_training_environment_during_a_rollout_is_an_error(kind: str, use: str, at_step: int):
    env = scripted([[7], [5]]) if kind == "DummyVecEnv" else episode_vec_env([[7], [5]])
    env = WRAPPERS[kind](env) if kind == "VecNormalize" else env
    model = REINFORCE("MlpPolicy", env, n_steps=12, seed=0, **SMALL)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="callback has stepped or reset the training environment during a rollout"):
        model.learn(200, callback=Do(at_step, lambda model: USES[use](model, env)))
    np.testing.assert_array_equal(state_of(model), before)
    recorder = Recorder()
    model.learn(200, callback=recorder)
    check_whole(recorder.rollouts)


# Errors of the environment ---------------------------------------------------------------------------------------------------


class LostRobot(Exception):
    """An error that cannot be made from a message."""

    def __init__(self, robot: int, reason: str):
        super().__init__(f"lost robot {robot}: {reason}")
        self.robot = robot


def failing(episode: int, step: int, n_envs: int, kind: str) -> tuple[VecEnv, Exception]:
    """Make environments with episodes of 4 steps, and the error that the last one raises (step 0: in reset)."""
    error = LostRobot(3, "no signal")
    spoil = spoil_at("reward" if step else "observation", episode, step, error)
    fns: list[Any] = [*[lambda: ScriptedEnv([4])] * (n_envs - 1), lambda: ScriptedEnv([4], n_envs - 1, spoil=spoil)]
    if kind == "subclass":
        return OwnVecEnv(fns), error
    return (DummyVecEnv(fns) if kind == "plain" else VecNormalize(EpisodeVecEnv(fns))), error


@pytest.mark.parametrize(
    ("kind", "n_envs", "episode", "step", "note"),
    [
        ("plain", 1, 2, 3, "Environment 0 raised this at step 3 of episode 2 (reset(seed={}))"),
        ("plain", 3, 2, 4, "Environment 2 raised this at step 4 of episode 8 (reset(seed={}))"),
        # Reset by learn(), in a step, and at the start of the second rollout
        ("plain", 1, 0, 0, "Environment 0 raised this in reset()"),
        ("plain", 3, 0, 0, "One of the 3 environments raised this in reset()"),
        ("plain", 3, 1, 0, "Environment 2 raised this in reset() of episode 5 (reset(seed={}))"),
        ("plain", 3, 2, 0, "Environment 2 raised this in reset() of episode 8 (reset(seed={}))"),
        ("VecNormalize", 2, 1, 2, "Environment 1 raised this at step 2 of episode 3 (reset(seed={}))"),
        ("VecNormalize", 2, 2, 0, "Environment 1 raised this in an episode outside the rollout"),
        ("subclass", 1, 1, 2, "Environment 0 raised this at step 2 of episode 1"),
        ("subclass", 3, 1, 2, "One of the 3 environments raised this in step()"),
        ("subclass", 3, 0, 0, "One of the 3 environments raised this in reset()"),
    ],
)
def test_errors_of_the_environment_keep_type_and_traceback_and_get_a_note(
    kind: str, n_envs: int, episode: int, step: int, note: str
):
    env, error = failing(episode, step, n_envs, kind)
    model = REINFORCE("MlpPolicy", env, n_steps=8, seed=0, **SMALL)
    with pytest.raises(LostRobot) as raised:
        model.learn(LONG)
    assert raised.value is error and error.__cause__ is None
    frames = traceback.extract_tb(error.__traceback__)
    assert [frame.name for frame in frames if frame.filename.endswith("envs.py")] == ["step" if step else "reset"]
    if "{}" in note:
        note = note.format(episode_seed(0, n_envs * episode + n_envs - 1))
    assert error.__notes__ == [note]


def test_an_error_in_reset_after_one_in_step_does_not_name_that_environment():
    env, error = failing(0, 2, 2, "plain")
    model = REINFORCE("MlpPolicy", env, n_steps=8, **SMALL)
    with pytest.raises(LostRobot):
        model.learn(1)
    env.envs[0].spoil = spoil_at("observation", 1, 0, other := OSError("broken"))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="broken"):
        model.learn(1)
    assert error.__notes__ == ["Environment 1 raised this at step 2 of episode 1"]
    assert other.__notes__ == ["One of the 2 environments raised this in reset()"]


def test_errors_of_a_wrapper_name_no_environment():
    class Broken(VecNormalize):
        def step_wait(self) -> Any:
            super().step_wait()
            raise LostRobot(3, "in the wrapper")

    with pytest.raises(LostRobot) as raised:
        REINFORCE("MlpPolicy", Broken(episode_vec_env([[4], [5]])), n_steps=8, **SMALL).learn(1)
    assert raised.value.__notes__ == ["One of the 2 environments raised this in step()"]


def test_an_error_in_a_process_ends_training_with_a_note():
    # In the first process: where processes are forked, later ones hold its pipe open
    env = subproc([lambda: ScriptedEnv([4], spoil=spoil_at("reward", 1, 2, OSError("lost"))), lambda: ScriptedEnv([4])])
    try:
        with pytest.raises((EOFError, ConnectionError)) as raised:
            REINFORCE("MlpPolicy", env, n_steps=8, **SMALL).learn(16)
        assert raised.value.__notes__ == ["One of the 2 environments raised this in step()"]
    finally:
        for process in env.processes:
            process.terminate()
            process.join()


# Observations and outputs that are not finite --------------------------------------------------------------------------------

WITH_PYTORCH: dict[str, Any] = dict(n_episodes=None, baseline=None, policy_kwargs=dict(net_arch=[4], activation_fn=nn.ELU))


def test_an_observation_that_the_policy_refuses_is_named_at_once():
    envs = [ScriptedEnv([4]), ScriptedEnv([4], spoil=spoil_at("observation", 1, 2, np.nan))]
    env = EpisodeVecEnv([lambda: envs[0], lambda: envs[1]])
    model = REINFORCE("MlpPolicy", env, n_steps=8, seed=0, **WITH_PYTORCH)
    place = rf"at step 2 of episode 3 \(reset\(seed={episode_seed(0, 3)}\)\)"
    with pytest.raises(ValueError, match=rf"Environment 1 returned the observation \[nan, .*\] {place}: ") as raised:
        model.learn(LONG)
    assert isinstance(raised.value.__cause__, ValueError)
    assert envs[1].lengths_run == [4, 2]


def test_a_long_array_is_named_by_its_first_bad_number():
    values = np.zeros((84, 84, 4))
    values[3, 2, 1] = np.inf
    assert "the observation with inf at (3, 2, 1) at step 1: NaN" in str(
        source.not_finite("He", "observation", values, "at step 1")
    )


def test_an_observation_of_another_shape_names_check_env():
    """Even if NumPy would repeat its number."""
    model = REINFORCE(
        "MlpPolicy", ScriptedEnv([3], spoil=lambda *args: args[3] if args[0] == "reward" else args[3][:1]), **SMALL
    )
    with pytest.raises(ValueError, match=r"An observation has the shape \(1,\) instead of \(3,\)") as raised:
        model.learn(1)
    assert "check_env of gymnasium.utils.env_checker" in raised.value.__notes__[0]


# Long episodes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "Simulators"])
def test_an_endless_episode_is_an_error(kind: str, monkeypatch: pytest.MonkeyPatch):
    """The second simulator is not even in the rollout, but others wait until it is ready."""
    monkeypatch.setattr(source, "_LONG_EPISODE", 2000)
    env = scripted([[3], [None]]) if kind == "plain" else Simulators([[4], [10**9]])
    model = REINFORCE("MlpPolicy", env, n_steps=10**6, **SMALL)
    if kind == "Simulators":
        model.learn(1, callback=lambda locals_, _: False)
    message = (
        r"episode of environment 1 has not ended after 2,000 steps.*set max_episode_steps \(with a VecEnv: in its env_kwargs"
    )
    with pytest.raises(RuntimeError, match=message):
        model.learn(1, reset_num_timesteps=False)


def test_a_warning_names_max_episode_steps_when_an_episode_takes_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "_PATIENCE", -1)
    with pytest.warns(UserWarning, match=r"not ended after -1 s: if it never ends, set max_episode_steps") as warned:
        REINFORCE("MlpPolicy", ScriptedEnv([500]), n_steps=1, **SMALL).learn(1)
    assert len(warned) == 1


def test_max_episode_steps_may_exceed_the_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "_LONG_EPISODE", 1000)
    env = ScriptedEnv([None])
    assert REINFORCE("MlpPolicy", env, n_steps=1, max_episode_steps=2500, **SMALL).learn(1).num_timesteps == 2500


def test_a_long_rollout_of_short_episodes_is_no_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "_LONG_EPISODE", 1000)
    REINFORCE("MlpPolicy", scripted([[3], [49]]), n_steps=1500, **SMALL).learn(1)
