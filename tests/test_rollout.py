"""Collecting whole episodes: which ones, in what order, what callbacks see and may do, and what bad environments get."""

from collections.abc import Callable
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)
from torch import nn

from sb3_reinforce import REINFORCE, rollout
from sb3_reinforce.episodes.acting import Actor, MlpActor, make_actor
from sb3_reinforce.episodes.schedule import EpisodeSchedule, episode_rng, episode_seed
from sb3_reinforce.episodes.source import EpisodeSource
from sb3_reinforce.episodes.vec_env import EpisodeVecEnv
from tests.envs import RandomLengthEnv, ScriptedEnv, Simulators, scripted, subproc

#: A policy that is made in no time
SMALL: dict[str, Any] = dict(policy_kwargs=dict(net_arch=[]), baseline=None)
LONG = 10**9


class Recorder(BaseCallback):
    """
    Keeps copies of rollouts, and of the local variables of each step.

    :param n_rollouts: end a call of ``learn(LONG)`` after so many
    """

    def __init__(self, n_rollouts: int | None = None) -> None:
        super().__init__()
        self.n_rollouts = n_rollouts
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
        counted = {"num_timesteps": self.model.num_timesteps}
        self.rollouts.append({name: np.array(getattr(buffer, name)) for name in names} | logged | counted)
        if len(self.rollouts) == self.n_rollouts:
            self.model.num_timesteps += LONG


def collect(env: VecEnv | gym.Env, n_rollouts: int = 1, **kwargs: Any) -> tuple[Recorder, REINFORCE]:
    """Collect rollouts, each in a call of learn() of its own."""
    recorder = Recorder()
    model = REINFORCE("MlpPolicy", env, **(SMALL | kwargs))
    for _ in range(n_rollouts):
        model.learn(1, callback=recorder, reset_num_timesteps=False)
    return recorder, model


def episodes_of(rollout: dict[str, Any], name: str = "observations") -> list[np.ndarray]:
    return np.split(rollout[name], np.flatnonzero(rollout["episode_starts"])[1:])


def check_whole(rollouts: list[dict[str, Any]]) -> None:
    """Every episode begins at its beginning; what ``ScriptedEnv`` and ``Simulators`` return ends with a step number."""
    assert rollouts
    for rollout_ in rollouts:
        for episode in episodes_of(rollout_):
            np.testing.assert_array_equal(episode[:, 2], np.arange(len(episode)))
            assert len(set(map(tuple, episode[:, :2]))) == 1


def state_of(model: REINFORCE) -> np.ndarray:
    return np.concatenate([value.numpy().ravel().copy() for value in model.policy.state_dict().values()])


def episode_vec_env(lengths_of_each: list[list[int]]) -> EpisodeVecEnv:
    return EpisodeVecEnv([lambda lengths=ls, i=i: ScriptedEnv(lengths, i) for i, ls in enumerate(lengths_of_each)])


WRAPPERS: dict[str, Callable[[VecEnv], VecEnv]] = {
    "VecNormalize": lambda env: VecNormalize(env, norm_obs=False),
    "VecFrameStack": lambda env: VecFrameStack(env, 2),
    "VecMonitor": VecMonitor,
}


# Which episodes are run ------------------------------------------------------------------------------------------------------


def play(lengths_of_each: list[list[int]], n_rollouts: int, n_steps: int = 0, n_episodes: int = 0) -> list[list]:
    """What DESIGN says, played through one step at a time: number and length of each environment's episodes, by rollout."""
    n_envs = len(lengths_of_each)
    wanted, next_number = n_steps * n_envs, 0
    resets = [0] * n_envs
    rollouts = []
    for _ in range(n_rollouts):
        episodes: list[list[tuple[int, int]]] = [[] for _ in range(n_envs)]
        remaining = [0] * n_envs
        collected = started = 0
        # All environments begin with an episode
        starting = list(range(n_envs))
        while True:
            for env in starting:
                remaining[env] = lengths_of_each[env][resets[env] % len(lengths_of_each[env])]
                episodes[env].append((next_number, remaining[env]))
                resets[env], next_number, started = resets[env] + 1, next_number + 1, started + 1
            running = [env for env in range(n_envs) if remaining[env] > 0]
            if not running:
                break
            collected += len(running)
            starting, n_starting = [], 0
            for env in running:
                remaining[env] -= 1
                if remaining[env] == 0 and (collected < wanted or started + n_starting < n_episodes):
                    starting, n_starting = [*starting, env], n_starting + 1
        rollouts.append([episode for of_env in episodes for episode in of_env])
    return rollouts


lengths = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=8)
targets = st.builds(lambda name, n: {name: n}, st.sampled_from(["n_steps", "n_episodes"]), st.integers(1, 12))


@settings(max_examples=40)
@given(lengths, targets, st.sampled_from([None, 0, 7]), st.lists(st.booleans(), min_size=1, max_size=3))
def test_batches_are_the_episodes_that_were_started_each_reset_once_by_number(
    lengths_of_each: list[list[int]], target: dict[str, int], seed: int | None, fresh_counts: list[bool]
):
    env = episode_vec_env(lengths_of_each)
    model, recorder = REINFORCE("MlpPolicy", env, seed=seed, **target, **SMALL), Recorder()
    for reset_num_timesteps in fresh_counts:
        model.learn(1, callback=recorder, reset_num_timesteps=reset_num_timesteps)
    expected = play(lengths_of_each, len(fresh_counts), **target)
    envs: list[Any] = env.envs
    for rollout_, numbers_and_lengths in zip(recorder.rollouts, expected, strict=True):
        # Environment by environment, in the order in which they were run
        found = [(envs[int(e[0, 0])].seeds[int(e[0, 1])], len(e)) for e in episodes_of(rollout_)]
        assert found == [(None if seed is None else episode_seed(seed, n), length) for n, length in numbers_and_lengths]
        assert rollout_["episodes"] == len(found)
        assert rollout_["idle_fraction"] == 0
    check_whole(recorder.rollouts)
    # No other reset, and no other step
    all_lengths = sorted(length for rollout_ in expected for _, length in rollout_)
    assert sorted(length for env in envs for length in env.lengths_run) == all_lengths
    assert sum(len(rollout_["rewards"]) for rollout_ in recorder.rollouts) == sum(all_lengths)


def test_episode_numbers_go_on_within_a_call_of_learn():
    env = episode_vec_env([[3, 5], [4]])
    recorder = Recorder(4)
    REINFORCE("MlpPolicy", env, n_steps=6, seed=2, **SMALL).learn(LONG, callback=recorder)
    seeds = [env.envs[int(e[0, 0])].seeds[int(e[0, 1])] for r in recorder.rollouts for e in episodes_of(r)]
    expected = play([[3, 5], [4]], 4, n_steps=6)
    assert seeds == [episode_seed(2, number) for rollout_ in expected for number, _ in rollout_]
    assert sum(env.n_resets for env in env.envs) == len(seeds)


def test_one_environment_stops_with_the_episode_that_reaches_n_steps():
    recorder, model = collect(scripted([[3]]), n_steps=7)
    (rollout_,) = recorder.rollouts
    assert len(rollout_["rewards"]) == model.num_timesteps == 9
    (rollout_,) = collect(scripted([[3]]), n_steps=6)[0].rollouts
    assert len(rollout_["rewards"]) == 6


def test_rewards_are_those_of_the_steps():
    (rollout_,) = collect(scripted([[2, 3], [4]]), n_steps=3)[0].rollouts
    episode, step = rollout_["observations"][:, 1], rollout_["observations"][:, 2]
    np.testing.assert_array_equal(rollout_["rewards"], 100 * episode + step + 1)


def learned(n_envs: int = 8, seed: int | None = 3, n_rollouts: int = 3, **kwargs: Any) -> tuple[np.ndarray, list[dict]]:
    env = DummyVecEnv([lambda: RandomLengthEnv(9) for _ in range(n_envs)])
    recorder, model = collect(env, n_rollouts, seed=seed, n_steps=10, baseline="linear", **kwargs)
    return state_of(model), recorder.rollouts


def test_a_run_of_eight_environments_and_its_repetition_are_equal_to_the_bit():
    (weights, rollouts), (weights_again, rollouts_again) = learned(), learned()
    np.testing.assert_array_equal(weights, weights_again)
    for one, other in zip(rollouts, rollouts_again, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    assert not np.array_equal(learned(seed=4)[0], weights)


class Between(BaseCallback):
    """Does something with the training environment when no rollout is running."""

    def __init__(self, when: str, action: Callable[[REINFORCE], Any]) -> None:
        super().__init__()
        self.when = when
        self.action = action

    def do(self, when: str) -> None:
        if when == self.when:
            self.action(self.model)  # type: ignore[arg-type]

    def _on_training_start(self) -> None:
        self.do("on_training_start")

    def _on_rollout_start(self) -> None:
        self.do("on_rollout_start")

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.do("on_rollout_end")

    def _on_training_end(self) -> None:
        self.do("on_training_end")


def random_actions(env: VecEnv) -> np.ndarray:
    return np.stack([env.action_space.sample() for _ in range(env.num_envs)])


def step_some(env: VecEnv) -> None:
    for _ in range(5):
        env.step(random_actions(env))


USES: dict[str, Callable[[REINFORCE, VecEnv], Any]] = {
    "evaluate_policy": lambda model, env: evaluate_policy(model, env, n_eval_episodes=3, warn=False),
    "step": lambda model, env: step_some(env),
    "reset": lambda model, env: env.reset(),
}
WHEN = ["between calls of learn()", "on_training_start", "on_rollout_start", "on_rollout_end", "on_training_end"]


def learn_and_use(when: str, use: str | None, given_object: bool = False, n_envs: int = 2) -> np.ndarray:
    """Learn in three calls, the second of which counts from 0, and use the training environment meanwhile."""
    vec_env = DummyVecEnv([lambda: RandomLengthEnv(9) for _ in range(n_envs)])
    model = REINFORCE("MlpPolicy", vec_env, n_steps=10, seed=0, policy_kwargs=dict(net_arch=[]))

    def action(model: REINFORCE) -> None:
        if use is not None:
            env = vec_env if given_object else model.get_env()
            assert env is not None
            USES[use](model, env)

    for call in range(3):
        while model._n_updates < 2 * call + 2:
            model.learn(11 * n_envs, callback=Between(when, action), reset_num_timesteps=call == 1)
        if when == WHEN[0]:
            action(model)
    return state_of(model)


@pytest.fixture(scope="module")
def undisturbed() -> np.ndarray:
    return learn_and_use(WHEN[0], None)


@pytest.mark.parametrize("given_object", [False, True], ids=["get_env()", "the given DummyVecEnv"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("when", WHEN)
def test_using_the_training_environment_between_rollouts_changes_nothing_of_what_is_learned(
    when: str, use: str, given_object: bool, undisturbed: np.ndarray
):
    np.testing.assert_array_equal(learn_and_use(when, use, given_object), undisturbed)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    # Within learn(), nobody knows that others have stepped processes
    ("when", "wrapper"),
    [*((when, wrapper) for when in WHEN for wrapper in ("none", "VecNormalize")), (WHEN[0], "processes")],
)
def test_using_the_training_environment_between_unseeded_rollouts_leaves_whole_episodes(when: str, use: str, wrapper: str):
    fns = [lambda index=index: ScriptedEnv([[7], [13]][index], index) for index in range(2)]
    makers = WRAPPERS | {"none": lambda env: env}
    with closing(subproc(fns) if wrapper == "processes" else makers[wrapper](EpisodeVecEnv(fns))) as env:
        model, recorder = REINFORCE("MlpPolicy", env, n_steps=5, **SMALL), Recorder()
        callback = [recorder, Between(when, lambda model: USES[use](model, env))]
        for _ in range(3):
            model.learn(80, callback=callback, reset_num_timesteps=False)
            if when == WHEN[0]:
                USES[use](model, env)
    assert len(recorder.rollouts) > 3
    check_whole(recorder.rollouts)


# Noise of the actions --------------------------------------------------------------------------------------------------------

BOX = spaces.Box(-1, 1, (2,))
NOISY = {
    "box": (BOX, {}),
    "discrete": (spaces.Discrete(5), {}),
    "multi-discrete": (spaces.MultiDiscrete([3, 4]), {}),
    "multi-binary": (spaces.MultiBinary(3), {}),
    "gsde": (BOX, dict(use_sde=True)),
    "gsde of 4 steps": (BOX, dict(use_sde=True, sde_sample_freq=4)),
}


def actions_by_episode(n_envs: int, actor: str, space: str, n_rollouts: int = 1, seed: int = 0) -> dict[tuple, np.ndarray]:
    """What the policy does in each of the first 12 episodes, which are known by their first observation."""
    action_space, kwargs = NOISY[space]
    env = EpisodeVecEnv([lambda: RandomLengthEnv(12, action_space) for _ in range(n_envs)])
    activation_fn = {"NumPy": nn.ReLU, "PyTorch": nn.ELU}[actor]
    model = REINFORCE(
        "MlpPolicy",
        env,
        n_episodes=12 // n_rollouts,
        seed=0,
        target_kl=None,
        learning_rate=0.0,
        normalize_observations=False,
        policy_kwargs=dict(net_arch=[8], activation_fn=activation_fn),
        **kwargs,
    )
    # The weights stay those of seed 0
    model.seed = seed
    recorder = Recorder()
    for _ in range(n_rollouts):
        model.learn(1, callback=recorder)
    assert isinstance(make_actor(model.policy, None), MlpActor) == (actor == "NumPy")  # type: ignore[arg-type]
    return {
        tuple(observations[0]): actions
        for rollout_ in recorder.rollouts
        for observations, actions in zip(episodes_of(rollout_), episodes_of(rollout_, "actions"), strict=True)
    }


@pytest.mark.parametrize("actor", ["NumPy", "PyTorch"])
@pytest.mark.parametrize("space", NOISY)
def test_the_actions_of_an_episode_do_not_depend_on_the_number_of_environments(space: str, actor: str):
    alone = actions_by_episode(1, actor, space)
    assert len(alone) == 12
    for other in (actions_by_episode(4, actor, space), actions_by_episode(3, actor, space, n_rollouts=4)):
        assert other.keys() == alone.keys()
        for key, actions in other.items():
            # Sums in a matrix product may be taken in another order
            np.testing.assert_allclose(actions, alone[key], rtol=1e-5, atol=1e-6)
    # Neither the noise of two episodes nor that of two seeds is the same
    first_steps = np.stack([actions[0] for actions in alone.values()])
    assert len(np.unique(first_steps, axis=0)) > 1
    all_actions = [np.concatenate([*actions_by_episode(1, actor, space, seed=seed).values()])[:20] for seed in (0, 1)]
    assert not np.array_equal(*all_actions)


@pytest.mark.parametrize("sde_sample_freq", [-1, 4])
def test_gsde_matrices_are_drawn_anew_every_sde_sample_freq_steps_of_the_episode(sde_sample_freq: int):
    """With features that are constant, actions change with the matrix and not otherwise."""
    env = EpisodeVecEnv([lambda: ScriptedEnv([7, 3, 10, 9]) for _ in range(2)])
    model = REINFORCE(
        "MlpPolicy",
        env,
        n_episodes=7,
        use_sde=True,
        sde_sample_freq=sde_sample_freq,
        normalize_observations=False,
        policy_kwargs=dict(net_arch=[3]),
    )
    with th.no_grad():
        model.policy.mlp_extractor.policy_net[0].weight.zero_()
        model.policy.mlp_extractor.policy_net[0].bias.fill_(1.0)
    recorder = Recorder()
    model.learn(1, callback=recorder)
    episodes = episodes_of(recorder.rollouts[0], "actions")
    for actions in episodes:
        parts = [actions[i : i + 4] for i in range(0, len(actions), 4)] if sde_sample_freq == 4 else [actions]
        for part in parts:
            np.testing.assert_array_equal(part, np.repeat(part[:1], len(part), axis=0))
        assert len({tuple(part[0]) for part in parts}) == len(parts)
    assert len({tuple(actions[0]) for actions in episodes}) == len(episodes) == 7


def test_stored_actions_are_the_unclipped_ones():
    kwargs = dict(net_arch=[], log_std_init=0.0)
    recorder, _ = collect(scripted([[50]]), n_steps=50, seed=0, policy_kwargs=kwargs)
    (rollout_,) = recorder.rollouts
    assert np.abs(rollout_["actions"]).max() > 1
    np.testing.assert_array_equal(rollout_["actions"], [step["actions"][0] for step in recorder.steps])
    for step in recorder.steps:
        np.testing.assert_array_equal(step["clipped_actions"], np.clip(step["actions"], -1, 1))


# VecEnvs that cannot leave environments alone --------------------------------------------------------------------------------


class Stepped:
    """What becomes of a ``VecEnv`` whose environments are all stepped, one step at a time."""

    def __init__(self, lengths_of_each: list[list[int]]):
        self.lengths_of_each = lengths_of_each
        self.n_envs = len(lengths_of_each)
        self.at = [(0, 0)] * self.n_envs

    def step(self) -> list[bool]:
        dones = []
        for env, (episode, step) in enumerate(self.at):
            dones.append(step + 1 == self.lengths_of_each[env][episode % len(self.lengths_of_each[env])])
            self.at[env] = (episode + 1, 0) if dones[env] else (episode, step + 1)
        return dones

    def rollout(self, at_start: list[bool], n_steps: int = 0, n_episodes: int = 0) -> tuple[list, list, list[bool]]:
        """Episodes (environment, episode) in the batch, who was active at each step, and who ended an episode last."""
        active, collected, started = list(at_start), 0, sum(at_start)
        episodes = [(env, self.at[env][0]) for env in range(self.n_envs) if active[env]]
        activity = []
        while any(active) or collected < n_steps * self.n_envs or started < n_episodes:
            activity.append(list(active))
            collected += sum(active)
            dones = self.step()
            for env in range(self.n_envs):
                if dones[env]:
                    active[env] = collected < n_steps * self.n_envs or started < n_episodes
                    if active[env]:
                        episodes.append((env, self.at[env][0]))
                        started += 1
        return sorted(episodes), activity, dones


@settings(max_examples=40)
@given(lengths, targets, st.integers(1, 3), st.lists(st.integers(0, 4), min_size=1, max_size=2))
def test_simulators_that_reset_themselves_are_reset_once_and_learned_from_in_whole_episodes(
    lengths_of_each: list[list[int]], target: dict[str, int], n_rollouts: int, steps_between: list[int]
):
    """Against one step at a time; others step the simulators between calls of learn()."""
    env, expected = Simulators(lengths_of_each), Stepped(lengths_of_each)
    model = REINFORCE("MlpPolicy", env, **target, **SMALL)
    at_start = [True] * env.num_envs
    for n_between in steps_between:
        recorder, n_timesteps = Recorder(n_rollouts), model.num_timesteps
        model.learn(LONG, callback=recorder, reset_num_timesteps=False)
        steps = iter(recorder.steps)
        for rollout_ in recorder.rollouts:
            episodes, activity, at_start = expected.rollout(at_start, **target)
            assert [tuple(e[0, :2]) for e in episodes_of(rollout_)] == episodes
            assert rollout_["idle_fraction"] == pytest.approx(1 - np.sum(activity) / np.size(activity))
            n_timesteps += env.num_envs * len(activity)
            assert rollout_["num_timesteps"] == n_timesteps
            for active in activity:
                check_idle(next(steps), active)
        check_whole(recorder.rollouts)
        for _ in range(n_between):
            env.step(np.zeros((env.num_envs, 2)))
            expected.step()
        at_start = [False] * env.num_envs
    assert env.n_resets == 1


def check_idle(seen: dict[str, Any], active: list[bool]) -> None:
    """What callbacks see of environments without an episode; active ones keep their keys and have a reward above 0."""
    assert seen["active"].tolist() == active
    assert (seen["rewards"] > 0).tolist() == active
    assert not (seen["dones"] & ~seen["active"]).any()
    assert seen["rewards"].dtype == np.float32 and seen["dones"].dtype == bool
    for index, (info, done) in enumerate(zip(seen["infos"], seen["dones"], strict=True)):
        assert info["key"] == index
        assert ("episode" in info, "terminal_observation" in info) == (done, done)


@pytest.mark.parametrize("wrap", [lambda env: env, VecMonitor])
def test_processes_are_reset_once_and_learned_from_in_whole_episodes(wrap: Callable[[VecEnv], VecEnv]):
    fns = [lambda index=index: Monitor(ScriptedEnv([[6, 3], [2]][index], index)) for index in range(2)]
    with closing(wrap(subproc(fns))) as env:
        recorder = Recorder(3)
        model = REINFORCE("MlpPolicy", env, n_steps=5, seed=0, **SMALL).learn(LONG, callback=recorder)
        assert model.env is env
        for _ in range(2):
            model.learn(1, callback=recorder, reset_num_timesteps=False)
            evaluate_policy(model, env, n_eval_episodes=1)
            env.step(np.zeros((2, 2)))
        expected = Stepped([[6, 3], [2]])
        at_start = [True, True]
        for rollout_ in recorder.rollouts[:3]:
            episodes, activity, at_start = expected.rollout(at_start, n_steps=5)
            assert [tuple(e[0, :2]) for e in episodes_of(rollout_)] == episodes
            assert rollout_["idle_fraction"] == pytest.approx(1 - np.sum(activity) / np.size(activity))
    assert any(not all(step["active"]) for step in recorder.steps)
    check_whole(recorder.rollouts)


def test_episodes_that_are_not_wanted_are_not_counted_by_callbacks():
    callback = StopTrainingOnMaxEpisodes(max_episodes=2)
    model = REINFORCE("MlpPolicy", Simulators([[6], [1]]), n_steps=1, **SMALL)
    model.learn(1, callback=callback)
    assert callback.n_episodes == 2
    assert [info["l"] for info in model.ep_info_buffer] == [1, 6]


@settings(max_examples=40)
@given(lengths, targets, st.sampled_from(list(WRAPPERS)), st.sampled_from([None, 3]))
def test_a_wrapped_episode_vec_env_is_reset_once_for_each_episode_by_number(
    lengths_of_each: list[list[int]], target: dict[str, int], wrapper: str, seed: int | None
):
    env = episode_vec_env(lengths_of_each)
    model, recorder = REINFORCE("MlpPolicy", WRAPPERS[wrapper](env), seed=seed, **target, **SMALL), Recorder(3)
    model.learn(LONG, callback=recorder)
    envs: list[Any] = env.envs
    next_number = 0
    for rollout_ in recorder.rollouts:
        rollout_["observations"] = rollout_["observations"][:, -3:]
        episodes = episodes_of(rollout_)
        expected = [None if seed is None else episode_seed(seed, next_number + n) for n in range(len(episodes))]
        found = [envs[int(e[0, 0])].seeds[int(e[0, 1])] for e in episodes]
        assert sorted(found, key=str) == sorted(expected, key=str)
        next_number += len(episodes)
        if len(envs) == 1:
            assert rollout_["idle_fraction"] == 0
    check_whole(recorder.rollouts)
    # All episodes but the last of each environment were run to their end, and nothing was reset in between
    for env_ in envs:
        assert env_.lengths_run[:-1] == [env_.lengths[e % len(env_.lengths)] for e in range(env_.n_resets - 1)]


def test_wrappers_that_count_steps_get_those_of_idle_environments_too():
    env = VecNormalize(episode_vec_env([[6], [2]]))
    model = REINFORCE("MlpPolicy", env, n_steps=1, **SMALL).learn(1)
    assert model.num_timesteps == 12
    assert len(model.rollout_buffer.rewards) == 8
    assert env.obs_rms.count == pytest.approx(14, abs=0.01)


def test_images_are_transposed_without_stepping_idle_environments():
    class ImageEnv(ScriptedEnv):
        observation_space = spaces.Box(0, 255, (8, 9, 3), dtype=np.uint8)

        def _observation(self) -> np.ndarray:
            return np.full((8, 9, 3), [self.index, self.episode, self.steps], dtype=np.uint8)

    model = REINFORCE("MlpPolicy", DummyVecEnv([lambda: ImageEnv([6]), lambda: ImageEnv([2], 1)]), n_steps=1, **SMALL)
    recorder = Recorder()
    model.learn(1, callback=recorder)
    assert isinstance(model.env, VecTransposeImage)
    (rollout_,) = recorder.rollouts
    assert rollout_["observations"].shape == (8, 3, 8, 9)
    assert rollout_["observations"][:, :, 0, 0].tolist() == [[0, 0, step] for step in range(6)] + [[1, 0, 0], [1, 0, 1]]
    assert model.num_timesteps == 8


@pytest.mark.parametrize("done_dtype", [np.uint8, int, float])
@pytest.mark.parametrize("reward_dtype", [np.float64, np.float32, int])
def test_learning_does_not_depend_on_the_types_of_rewards_and_done_flags(reward_dtype: type, done_dtype: type):
    def learn(*dtypes: type) -> tuple[np.ndarray, list[dict], list[dict]]:
        env = Simulators([[5, 3], [2], [7]], dtypes)  # type: ignore[arg-type]
        recorder, model = collect(env, 3, n_steps=6, seed=0, baseline="linear")
        for step in recorder.steps:
            assert (step["rewards"].dtype, step["dones"].dtype) == (np.float32, bool)
        return state_of(model), recorder.rollouts, recorder.steps

    state, rollouts, steps = learn(reward_dtype, done_dtype)
    expected_state, expected_rollouts, expected_steps = learn(np.float32, bool)
    np.testing.assert_array_equal(state, expected_state)
    for found, expected in zip([*rollouts, *steps], [*expected_rollouts, *expected_steps], strict=True):
        for name in expected.keys() - {"infos"}:
            np.testing.assert_array_equal(found[name], expected[name])


# Callbacks that change things in the middle of a rollout ---------------------------------------------------------------------


class At(BaseCallback):
    """Does something once, at the given step."""

    def __init__(self, n_calls: int, action: Callable[[REINFORCE], Any]) -> None:
        super().__init__()
        self.when = n_calls
        self.action = action

    def _on_step(self) -> bool:
        if self.n_calls == self.when:
            self.action(self.model)  # type: ignore[arg-type]
        return True


def replace_log_std(policy: Any) -> None:
    policy.log_std = nn.Parameter(th.tensor([1.0, -1.0]))


def replace_log_std_data(policy: Any) -> None:
    policy.log_std.data = th.tensor([1.0, -1.0])


def change_in_place(policy: Any) -> None:
    with th.no_grad():
        policy.log_std.fill_(1.0)
        policy.mlp_extractor.policy_net[0].bias += 0.5


def load_vector(policy: Any) -> None:
    policy.load_from_vector(policy.parameters_to_vector() + 0.3)


def replace_action_net(policy: Any) -> None:
    policy.action_net = nn.Linear(policy.mlp_extractor.latent_dim_pi, 2)


def replace_hidden_layer(policy: Any) -> None:
    policy.mlp_extractor.policy_net[0] = nn.Linear(3, 8)


def replace_activation(policy: Any) -> None:
    policy.mlp_extractor.policy_net[1] = nn.Sigmoid()


def load_other_state(policy: Any) -> None:
    state = {name: value.clone() for name, value in policy.state_dict().items()}
    state["action_net.bias"] += 1.0
    state["observation_normalizer.mean_0"] += 2.0
    state["observation_normalizer.var_0"] += 3.0
    policy.load_state_dict(state)


def update_statistics(policy: Any) -> None:
    policy.observation_normalizer.update(np.random.default_rng(0).normal(5, 3, (20, 3)))


def change_variance_in_place(policy: Any) -> None:
    policy.observation_normalizer.var_0.fill_(9.0)


def replace_mean(policy: Any) -> None:
    policy.observation_normalizer.mean_0 = th.full((3,), 2.0, dtype=th.float64)


CHANGES = [
    replace_log_std,
    replace_log_std_data,
    change_in_place,
    load_vector,
    replace_action_net,
    replace_hidden_layer,
    replace_activation,
    load_other_state,
    update_statistics,
    change_variance_in_place,
    replace_mean,
]


@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.ELU], ids=["NumPy", "PyTorch"])
@pytest.mark.parametrize("change", [*CHANGES, None], ids=lambda change: change.__name__ if change else "replace_policy")
def test_a_changed_policy_acts_from_the_next_step_on(change: Callable[[Any], None] | None, activation_fn: type[nn.Module]):
    """Against the policy as it is before each step, seen through PyTorch, and the noise of the only episode."""

    class WideEnv(ScriptedEnv):
        action_space = spaces.Box(-1000, 1000, (2,))

        def _observation(self) -> np.ndarray:
            return self.np_random.normal(size=3).astype(np.float32)

    def outputs(policy: Any, observation: np.ndarray) -> np.ndarray:
        with th.no_grad():
            distribution = policy.get_distribution(th.as_tensor(observation)).distribution
        return np.stack([distribution.mean.numpy(), distribution.stddev.numpy()])

    expected: list[np.ndarray] = []

    class Expect(BaseCallback):
        def _on_step(self) -> bool:
            expected.append(outputs(self.model.policy, self.locals["new_obs"])[:, 0])
            return True

    def apply(model: REINFORCE) -> None:
        probe = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
        before = outputs(model.policy, probe)
        with th.random.fork_rng():
            th.manual_seed(1)
            if change is None:
                model.policy = REINFORCE("MlpPolicy", WideEnv([1]), policy_kwargs=policy_kwargs).policy
                model.policy.action_net.bias.data.fill_(2.0)
            else:
                change(model.policy)
        assert np.abs(outputs(model.policy, probe) - before).max() > 0.05

    policy_kwargs = dict(net_arch=[8], activation_fn=activation_fn)
    model = REINFORCE("MlpPolicy", WideEnv([30]), n_episodes=1, seed=0, policy_kwargs=policy_kwargs)
    with th.no_grad():
        model.policy.action_net.weight.normal_(generator=th.Generator().manual_seed(0))
    model.policy.observation_normalizer.update(np.random.default_rng(1).normal(size=(9, 3)))
    assert type(make_actor(model.policy, None)) is (MlpActor if activation_fn is nn.ReLU else Actor)  # type: ignore[arg-type]
    recorder = Recorder()
    model.learn(1, callback=[At(11, apply), Expect(), recorder])
    acted = recorder.rollouts[0]["actions"]
    noise = episode_rng(0, 0).standard_normal((30, 2), dtype=np.float32)
    assert len(acted) == len(expected) == 30
    # What the policy is after one step decides what it does in the next
    for step in range(1, 30):
        mean, std = expected[step - 1]
        np.testing.assert_allclose(acted[step], mean + std * noise[step], rtol=1e-4, atol=1e-4)


def scripted_env(wrap: str) -> tuple[VecEnv, VecEnv]:
    """The environment given to a model, and the object that a callback holds."""
    env = scripted([[7], [5]])
    if wrap == "DummyVecEnv":
        return env, env
    env = EpisodeVecEnv([lambda index=index: ScriptedEnv([[7], [5]][index], index) for index in range(2)])
    env = env if wrap == "EpisodeVecEnv" else WRAPPERS[wrap](env)
    return env, env


@pytest.mark.parametrize("wrap", ["DummyVecEnv", "EpisodeVecEnv", "VecNormalize"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("at_step", [1, 7])
def test_using_the_training_environment_within_a_rollout_is_an_error_that_says_so(at_step: int, use: str, wrap: str):
    env, held = scripted_env(wrap)
    model = REINFORCE("MlpPolicy", env, n_steps=12, seed=0, **SMALL)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="callback has stepped or reset the training environment in the middle"):
        model.learn(200, callback=At(at_step, lambda model: USES[use](model, held)))
    np.testing.assert_array_equal(state_of(model), before)
    recorder = Recorder()
    model.learn(200, callback=recorder)
    for rollout_ in recorder.rollouts:
        rollout_["observations"] = rollout_["observations"][:, -3:]
    check_whole(recorder.rollouts)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("kind", ["EpisodeVecEnv", "VecNormalize", "Simulators"])
@pytest.mark.parametrize("when", ["on_rollout_start", "on_step", "on_last_step", "on_rollout_end"])
def test_another_environment_set_by_a_callback_runs_whole_episodes_from_the_next_rollout_on(
    when: str, kind: str, seed: int | None
):
    """From the rollout that begins, if it is set there; one that is running goes on where it is."""

    def make(lengths_of_each: list[list[int]]) -> VecEnv:
        if kind == "Simulators":
            return Simulators(lengths_of_each)
        env = episode_vec_env(lengths_of_each)
        return env if kind == "EpisodeVecEnv" else VecNormalize(env, norm_obs=False, norm_reward=False)

    old, new = make([[3], [4]]), make([[6], [5]])
    model = REINFORCE("MlpPolicy", old, n_steps=7, seed=seed, **SMALL)

    def set_env(model: REINFORCE) -> None:
        if model.env is old:
            model.set_env(new)

    changing: BaseCallback = At(2, set_env) if when == "on_step" else At(8, set_env)
    if when.startswith("on_rollout"):
        changing = Between(when, set_env)
    recorder = Recorder(3)
    model.learn(LONG, callback=[changing, recorder])
    model.learn(1, callback=recorder, reset_num_timesteps=False)
    check_whole(recorder.rollouts)
    assert model.env is new
    lengths = [{len(e) for e in episodes_of(rollout_)} for rollout_ in recorder.rollouts]
    assert lengths == [{6, 5} if when == "on_rollout_start" else {3, 4}, *[{6, 5}] * 3]
    if isinstance(new, Simulators):
        assert new.n_resets == 1
    elif kind == "EpisodeVecEnv" and seed is not None:
        seeds = [env.seeds for env in [*old.unwrapped.envs, *new.unwrapped.envs]]
        counted = [episode_seed(0, number) for number in range(sum(rollout_["episodes"] for rollout_ in recorder.rollouts))]
        resets_of_old = len(seeds[0]) + len(seeds[1])
        if when == "on_rollout_start":
            assert resets_of_old == 2  # by learn(), before the first rollout
            assert sorted(seeds[2] + seeds[3]) == sorted(counted)
        else:
            assert sorted(np.concatenate(seeds)) == sorted(counted)


def test_a_callback_may_stop_within_an_episode_and_learning_goes_on_with_whole_episodes():
    def learn(interrupt: bool, env: VecEnv) -> dict[str, Any]:
        model = REINFORCE("MlpPolicy", env, n_steps=6, seed=0, **SMALL)
        if interrupt:
            model.learn(100, callback=lambda locals_, globals_: locals_["n_steps"] < 4)
            assert model._n_updates == 0
        recorder = Recorder()
        model.learn(1, callback=recorder, reset_num_timesteps=False)
        assert model._n_updates == 1
        return recorder.rollouts[0]

    for make in (lambda: scripted([[5], [3]]), lambda: Simulators([[5], [3]])):
        check_whole([learn(True, make())])
    # The rollout is collected again as if it had never been started
    interrupted, whole = (learn(flag, DummyVecEnv([lambda: RandomLengthEnv(9)] * 3)) for flag in (True, False))
    for name in ("observations", "actions", "rewards"):
        np.testing.assert_array_equal(interrupted[name], whole[name])


def test_errors_of_callbacks_are_left_alone():
    def callback(locals_: dict, globals_: dict) -> bool:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        REINFORCE("MlpPolicy", scripted([[4]]), n_steps=8).learn(16, callback=callback)


# Time limits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_bootstrapping_adds_the_discounted_value_of_the_terminal_observation_at_time_outs_only(
    truncated: bool, bootstrap: bool
):
    env = scripted([[4], [2]], truncated=truncated)
    raw = dict(baseline="linear", normalize_observations=False, policy_kwargs={})
    recorder, model = collect(env, n_steps=2, gamma=0.9, bootstrap_timeouts=bootstrap, **raw)
    with th.no_grad():
        model.policy.value_net.weight.fill_(1.0)  # the value is then the sum of the observation
        model.policy.value_net.bias.fill_(0.5)
    model.learn(1, callback=recorder, reset_num_timesteps=False)
    rollout_ = recorder.rollouts[-1]
    env_index, episode, step = rollout_["observations"].T
    expected = 100 * episode + step + 1
    if truncated and bootstrap:
        last = step + 1 == np.where(env_index == 0, 4, 2)
        expected = expected + last * 0.9 * (env_index + episode + step + 1 + 0.5)
    np.testing.assert_allclose(rollout_["rewards"], expected, rtol=1e-6)


@pytest.fixture
def at_most_1000_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "ENDLESS_STEPS", 1000)


ENDLESS = r"episode of environment 1 has not ended after 1,\d\d\d steps.*max_episode_steps.*env_kwargs.*ENDLESS_STEPS"


@pytest.mark.usefixtures("at_most_1000_steps")
def test_an_endless_episode_is_an_error():
    model = REINFORCE("MlpPolicy", scripted([[3], [None]]), n_steps=10, **SMALL)
    before = state_of(model)
    with pytest.raises(RuntimeError, match=ENDLESS):
        model.learn(1)
    np.testing.assert_array_equal(state_of(model), before)
    assert model.num_timesteps < 2200


@pytest.mark.usefixtures("at_most_1000_steps")
def test_long_rollouts_of_short_episodes_are_not_endless():
    model = REINFORCE("MlpPolicy", scripted([[3], [999]]), n_steps=1500, **SMALL).learn(1)
    assert len(model.rollout_buffer.rewards) >= 3000


@pytest.mark.usefixtures("at_most_1000_steps")
@pytest.mark.parametrize("n_batches_before", [0, 2])
def test_an_endless_episode_that_runs_unobserved_is_an_error(n_batches_before: int):
    """The second simulator has no episode in the rollout, but never gets ready for one."""
    env = Simulators([[4], [2, 10**9]])
    model = REINFORCE("MlpPolicy", env, n_steps=2, **SMALL)
    for _ in range(n_batches_before + 1):
        model.learn(1, reset_num_timesteps=False)
    model.n_steps = 1500
    with pytest.raises(RuntimeError, match=ENDLESS):
        model.learn(1, reset_num_timesteps=False)


@pytest.mark.parametrize(("n_values", "limit"), [(2**23, 1000), (2**21, 2**11), (1, 3000)])
def test_an_endless_episode_of_large_observations_is_an_error_before_it_fills_memory(
    n_values: int, limit: int, monkeypatch: pytest.MonkeyPatch
):
    """4 GiB of observations at most, but never less than 1000 steps."""

    class LargeObservations(Simulators):
        def _observations(self) -> np.ndarray:
            return np.broadcast_to(np.uint8(0), (self.num_envs, n_values))

        def step_wait(self) -> Any:
            return self._observations(), np.zeros(1), np.zeros(1, dtype=bool), [{}]

    monkeypatch.setattr(rollout, "ENDLESS_STEPS", 3000)
    env = LargeObservations([[10**9]])
    env.observation_space = spaces.Box(0, 255, (n_values,), dtype=np.uint8)
    source = EpisodeSource(env, EpisodeSchedule(1, 10**9, 0))
    source.begin(None, np.ones(1, dtype=bool))
    n_steps = 0
    with pytest.raises(RuntimeError, match="environment 0 has not ended"):
        while n_steps < 10_000:
            n_steps += 1
            source.step(np.zeros((1, 2)))
    # It is looked for once in a while
    assert limit <= n_steps < limit + 1000


# Bad environments ------------------------------------------------------------------------------------------------------------


def at(what: str, episode: int, step: int, value: Any) -> Callable:
    """Spoil one thing in one place."""

    def spoil(a_what: str, an_episode: int, a_step: int, a_value: Any) -> Any:
        if (a_what, an_episode, a_step) != (what, episode, step):
            return a_value
        if isinstance(value, Exception):
            raise value
        if isinstance(a_value, dict):
            return a_value | {"b": np.full_like(a_value["b"], value)}
        return np.full_like(a_value, value) if isinstance(a_value, np.ndarray) else value

    return spoil


class DictEnv(ScriptedEnv):
    observation_space = spaces.Dict(a=spaces.Box(-np.inf, np.inf, (3,)), b=spaces.Box(-np.inf, np.inf, (2,)))

    def _observation(self) -> Any:
        return {"a": super()._observation(), "b": np.zeros(2, dtype=np.float32)}


def pair(cls: type[ScriptedEnv], spoil: Callable) -> tuple[VecEnv, ScriptedEnv]:
    """Two environments with episodes of 4 steps; environment 1 is spoiled, and its episodes have the numbers 1, 3, 5, 7."""
    bad = cls([4], 1, spoil=spoil)
    return DummyVecEnv([lambda: cls([4]), lambda: bad]), bad


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize(
    ("what", "step"), [("reward", 2), ("reward", 4), ("observation", 2), ("observation", 0), ("terminal observation", 4)]
)
@pytest.mark.parametrize("cls", [ScriptedEnv, DictEnv])
@pytest.mark.parametrize("episode", [0, 2])
def test_values_that_are_not_finite_are_refused_with_their_place(
    episode: int, cls: type[ScriptedEnv], what: str, step: int, value: float
):
    env, bad = pair(cls, at(what, episode, step, value))
    policy = "MlpPolicy" if cls is ScriptedEnv else "MultiInputPolicy"
    model = REINFORCE(policy, env, n_steps=8, seed=0, policy_kwargs=dict(net_arch=[]))
    before = state_of(model)
    entry = " under 'b'" if cls is DictEnv and what != "reward" else ""
    # Two episodes of each environment make a batch. What a reset returns belongs to the episode that it begins
    place = rf"at step {step} of episode {2 * episode + 1} \(reset\(seed=\d+\)\)"
    with pytest.raises(
        ValueError, match=f"Environment 1 returned the {what}{entry} .*(nan|inf).* {place}: .*too large for float32"
    ):
        model.learn(32)
    if episode == 0:
        np.testing.assert_array_equal(state_of(model), before)
    else:
        assert model._n_updates == 1
    bad.spoil = lambda what, episode, step, value: value
    n_updates = model._n_updates
    model.learn(16)
    assert model._n_updates == n_updates + 1
    assert not np.array_equal(state_of(model), before)


def test_episodes_in_messages_are_counted_over_the_life_of_the_model():
    env, _ = pair(ScriptedEnv, at("reward", 4, 3, np.nan))
    model = REINFORCE("MlpPolicy", env, n_steps=8, **SMALL)
    for _ in range(2):
        model.learn(16)
    with pytest.raises(ValueError, match="at step 3 of episode 9"):
        model.learn(16)


@pytest.mark.parametrize("make", [DummyVecEnv, lambda fns: VecNormalize(EpisodeVecEnv(fns), norm_reward=False), subproc])
def test_a_reward_that_is_too_large_for_float32_is_refused_in_these_words(make: Callable[[list], VecEnv]):
    with closing(make([lambda: ScriptedEnv([4]), lambda: ScriptedEnv([4], spoil=at("reward", 0, 3, 1e39))])) as env:
        with pytest.raises(ValueError, match=r"Environment 1 .* reward inf at step 3 of episode 1: .*too large for float32"):
            REINFORCE("MlpPolicy", env, n_steps=8, **SMALL).learn(16)


def test_the_largest_float32_is_no_error_in_itself():
    spoil = at("reward", 0, 3, float(np.finfo(np.float32).max))
    recorder, _ = collect(ScriptedEnv([4], spoil=spoil), n_steps=4, normalize_advantage=True)
    assert recorder.rollouts[0]["rewards"][2] == np.finfo(np.float32).max


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize(
    ("what", "step", "place"),
    [
        ("reward", 3, r"in step\(\) at step 3 of episode 5"),
        # The reset after episode 3, within a step
        ("observation", 0, r"in (step|reset)\(\)"),
    ],
)
def test_an_environment_that_raises_is_named(what: str, step: int, place: str, seed: int | None):
    error = OSError("lost the robot")
    env, bad = pair(ScriptedEnv, at(what, 2, step, error))
    model = REINFORCE("MlpPolicy", env, n_steps=8, seed=seed)
    model.learn(16)
    before = state_of(model)
    with pytest.raises(RuntimeError, match=f"Environment 1 raised OSError {place}.*lost the robot") as raised:
        model.learn(16, reset_num_timesteps=False)
    assert raised.value.__cause__ is error
    np.testing.assert_array_equal(state_of(model), before)
    bad.spoil = lambda what, episode, step, value: value
    model.learn(16, reset_num_timesteps=False)
    assert not np.array_equal(state_of(model), before)


@pytest.mark.parametrize("make", [DummyVecEnv, lambda fns: VecNormalize(EpisodeVecEnv(fns))])
@pytest.mark.parametrize("episode", [0, 1])
def test_a_reset_that_raises_is_named(episode: int, make: Callable[[list], VecEnv]):
    env = make([lambda: ScriptedEnv([4]), lambda: ScriptedEnv([4], spoil=at("observation", episode, 0, OSError("no robot")))])
    with pytest.raises(RuntimeError, match=r"Environment 1 raised OSError .*no robot"):
        REINFORCE("MlpPolicy", env, n_steps=8, **SMALL).learn(16)


def test_a_process_that_dies_is_named():
    # The first process: where they are forked, those before one that dies hold its pipe open
    env = subproc([lambda: ScriptedEnv([4], spoil=at("reward", 1, 2, OSError("lost"))), lambda: ScriptedEnv([4])])
    try:
        with pytest.raises(RuntimeError, match=r"Environment 0 raised .* at step 2 of episode 2"):
            REINFORCE("MlpPolicy", env, n_steps=8, **SMALL).learn(16)
    finally:
        for process in env.processes:
            process.terminate()
            process.join()


def test_a_policy_that_returns_nan_is_refused_before_the_environment_sees_it():
    for action_space in (spaces.Box(-1, 1, (2,)), spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)):
        env = ScriptedEnv([4])
        env.action_space = action_space
        model = REINFORCE("MlpPolicy", env, n_steps=8)
        model.policy.action_net.bias.data[0] = np.nan
        with pytest.raises(ValueError, match=r"(?s)policy's output is not finite.*nan"):
            model.learn(16)
        assert env.steps == 0


# Statistics ------------------------------------------------------------------------------------------------------------------


def test_episode_statistics_are_those_of_the_monitors():
    model = REINFORCE("MlpPolicy", scripted([[3], [5]]), n_steps=4, **SMALL).learn(1)
    assert [(info["l"], info["r"]) for info in model.ep_info_buffer] == [(3, 6), (5, 15), (3, 306)]


@pytest.mark.parametrize("make", [VecNormalize, lambda env: VecFrameStack(env, 2)], ids=["VecNormalize", "VecFrameStack"])
def test_two_models_on_one_wrapped_environment_learn_from_whole_episodes(make: Callable[[VecEnv], VecEnv]):
    inner = EpisodeVecEnv([lambda index=index: ScriptedEnv([4, 7, 5], index) for index in range(3)])
    env = make(inner)
    models = [REINFORCE("MlpPolicy", env, n_steps=10, seed=seed) for seed in (0, 1)]
    lengths: set[int] = set()
    for _ in range(4):
        for model in models:
            model.learn(1, reset_num_timesteps=False)
            starts = np.append(np.flatnonzero(model.rollout_buffer.episode_starts), model.rollout_buffer.size())
            lengths |= set(np.diff(starts).tolist())
    assert lengths <= {4, 5, 7}


def test_an_environment_set_by_a_callback_that_stops_is_reset_before_it_is_stepped():
    new = VecNormalize(DummyVecEnv([lambda: Monitor(ScriptedEnv([4]))]))

    def callback(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        locals_["model"].set_env(new)
        return False

    model = REINFORCE("MlpPolicy", Monitor(ScriptedEnv([5])), n_steps=8)
    model.learn(8, callback=callback)
    model.learn(8, reset_num_timesteps=False)
    assert {info["l"] for info in model.ep_info_buffer} == {4}


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("what", ["reward", "observation"])
def test_a_bad_value_below_vec_normalize_is_that_of_its_environment(what: str, value: float):
    def spoil(kind: str, episode: int, step: int, good: Any) -> Any:
        return good * value if (kind, episode, step) == (what, 0, 2) else good

    env = VecNormalize(DummyVecEnv([lambda: ScriptedEnv([5]), lambda: ScriptedEnv([5], spoil=spoil)]))
    with pytest.raises(ValueError, match=f"Environment 1 returned the {what} .* at step 2 of episode 1"):
        REINFORCE("MlpPolicy", env, n_steps=8, seed=0).learn(16)
