"""
Whatever is done to a model, in whatever order: its weights stay finite, its counters are right, and what is refused changes
nothing. With a seed, its episodes and updates are always the same.
"""

import functools
import io
import re
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from typing import Any
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_reinforce import REINFORCE, InverseTimeDecay
from sb3_reinforce.episodes.schedule import episode_seed
from tests.integration.common import CHOICE, PAIR, VECTOR, assert_same

OBSERVATION_SPACES = dict(
    vector=VECTOR,
    doubles=spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
    choice=spaces.Discrete(3),
    choices=spaces.MultiDiscrete([2, 3]),
    bits=spaces.MultiBinary(2),
    image=spaces.Box(0, 255, (3, 4, 1), np.uint8),
    dictionary=spaces.Dict(place=spaces.Box(-1, 1, (2,)), choice=spaces.Discrete(2)),
)
ACTION_SPACES = dict(
    pair=PAIR,
    unbounded=spaces.Box(-np.inf, np.inf, (1,)),
    choice=CHOICE,
    choices=spaces.MultiDiscrete([2, 3]),
    bits=spaces.MultiBinary(2),
)


class Lost(Exception):
    """What environments and callbacks of these tests raise."""


class Fault:
    """
    Something that goes wrong, once or from then on, in the environments that share it.

    :param spoil: gets what an environment is about to return, and returns something else or raises
    :param when: "reset" or "step"
    :param delay: how many of these go well before
    """

    def __init__(self, spoil: Callable[[tuple], Any] = lambda result: result, when: str = "step", delay: int = 0):
        self.spoil = spoil
        self.when = when
        self.delay = delay
        self.has_struck = False

    def strikes(self, when: str, result: tuple) -> Any:
        if when != self.when or (self.has_struck and self.spoil is not never_end):
            return result
        self.delay -= 1
        if self.delay >= 0:
            return result
        self.has_struck = True
        return self.spoil(result)


class World:
    """What the environments of a model have in common: how many steps they have taken, and what goes wrong next."""

    def __init__(self) -> None:
        self.n_steps = 0
        self.fault = Fault()


class FuzzEnv(gym.Env):
    """
    Episodes of 1 to ``max_length`` steps, of which all follows from the seed and the actions.

    :param config: see :func:`configs`
    :param world: what goes wrong
    """

    def __init__(self, config: dict[str, Any], world: World):
        # A copy, because a space draws its samples from a generator of its own
        self.observation_space = deepcopy(OBSERVATION_SPACES[config["observations"]])
        self.action_space = ACTION_SPACES[config["actions"]]
        self.max_length = config["max_length"]
        self.times_out = config["times_out"]
        self.world = world

    def _observe(self) -> Any:
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample()

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.remaining = self.length = int(self.np_random.integers(1, self.max_length, endpoint=True))
        return self.world.fault.strikes("reset", (self._observe(), {}))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        self.world.n_steps += 1
        self.remaining -= 1
        is_over = self.remaining == 0
        times_out = self.times_out and bool(self.np_random.random() < 0.5)
        reward = float(self.np_random.normal() + np.sum(action))
        result = self._observe(), reward, is_over and not times_out, is_over and times_out, {}
        return self.world.fault.strikes("step", result)


def make_env(config: dict[str, Any], world: World) -> Any:
    kind, n_envs = config["env"], config["n_envs"]
    if kind == "env":
        return FuzzEnv(config, world)
    if kind == "function":
        return lambda: FuzzEnv(config, world)
    env = DummyVecEnv([lambda: Monitor(FuzzEnv(config, world))] * n_envs)
    # Its statistics are those of all steps, so that not even seeded episodes are the same
    return VecNormalize(env) if kind == "VecNormalize" else env


def make_model(config: dict[str, Any], world: World, **kwargs: Any) -> REINFORCE:
    policy = "MultiInputPolicy" if config["observations"] == "dictionary" else "MlpPolicy"
    return REINFORCE(policy, make_env(config, world), device="cpu", **(config["arguments"] | kwargs))


@st.composite
def configs(draw: Callable[..., Any]) -> dict[str, Any]:
    """Environments, and valid arguments for a model of them."""
    env = draw(st.sampled_from(["env", "function", "DummyVecEnv", "DummyVecEnv", "VecNormalize"]))
    observations = draw(st.sampled_from(sorted(OBSERVATION_SPACES)))
    if env == "VecNormalize" and observations not in ("vector", "doubles"):
        env = "DummyVecEnv"
    actions = draw(st.sampled_from(sorted(ACTION_SPACES)))
    baseline = draw(st.sampled_from(["linear", "quadratic", "random_features", None]))
    advantage = draw(st.sampled_from(["monte_carlo", "q", "advantage", "td"])) if baseline else "monte_carlo"
    if observations == "choices" and advantage != "td":
        # KNOWN: see test_action_values_of_several_choices
        advantage = "monte_carlo"
    use_sde = actions in ("pair", "unbounded") and draw(st.booleans())
    policy_kwargs: dict[str, Any] = dict(net_arch=draw(st.sampled_from([[], [4]])), ortho_init=draw(st.booleans()))
    if use_sde:
        policy_kwargs["squash_output"] = actions == "pair" and draw(st.booleans())
    by_episodes = draw(st.booleans())
    target_kl = draw(st.sampled_from([None, 0.02, InverseTimeDecay(0.1, halving=2)]))
    arguments = dict(
        n_steps=None if by_episodes else draw(st.integers(1, 12)),
        n_episodes=draw(st.integers(1, 4)) if by_episodes else None,
        gamma=draw(st.sampled_from([0.5, 0.99, 1.0])),
        ent_coef=draw(st.sampled_from([0.0, 0.1])),
        target_kl=target_kl,
        learning_rate=draw(st.sampled_from([0.0, 1e-2])),
        cg_max_steps=draw(st.integers(1, 3)),
        cg_damping=draw(st.sampled_from([0.01, 10.0])),
        use_sde=use_sde,
        sde_sample_freq=draw(st.sampled_from([-1, 1, 3])),
        normalize_advantage=draw(st.booleans()),
        advantage=advantage,
        baseline=baseline,
        baseline_memory=draw(st.sampled_from([0.0, 0.6])),
        baseline_kwargs=dict(n_units=3) if baseline == "random_features" else {},
        bootstrap_timeouts=draw(st.booleans()),
        normalize_observations=draw(st.booleans()),
        policy_kwargs=policy_kwargs,
        seed=draw(st.sampled_from([None, 0, 7])),
    )
    return dict(
        env=env,
        n_envs=draw(st.integers(1, 3)) if "Vec" in env else 1,
        observations=observations,
        actions=actions,
        max_length=draw(st.sampled_from([1, 6])),
        times_out=draw(st.booleans()),
        arguments=arguments,
    )


# The arguments of a model ----------------------------------------------------------------------------------------------------

COUNTS = [0, -1, 1.5, "3", True, np.nan]
NUMBERS = [np.nan, np.inf, -np.inf, "1", -1.0]
INVALID: dict[str, list[Any]] = dict(
    n_steps=COUNTS,
    n_episodes=COUNTS,
    max_episode_steps=COUNTS,
    stats_window_size=[*COUNTS, None],
    gamma=[*NUMBERS, 0.0, 1.0001, None],
    ent_coef=[*NUMBERS, None],
    target_kl=[*NUMBERS, 0.0],
    learning_rate=[*NUMBERS, None, lambda progress: np.nan, lambda progress: -1.0],
    cg_max_steps=[*COUNTS, None],
    cg_damping=[*NUMBERS, 0.0, None],
    advantage=["Q", None, 1],
    baseline=["Linear", 1],
    baseline_memory=[*NUMBERS, 1.0, None],
    baseline_kwargs=[dict(ridge=value) for value in (*NUMBERS, None)] + [dict(units=3), dict(n_units=0)],
    rollout_buffer_class=[dict, "EpisodeRolloutBuffer"],
    policy=["Policy", dict],
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(configs(), st.data())
def test_an_argument_out_of_its_range_is_refused_beside_any_others(config: dict[str, Any], data: Any):
    """Its name is in the message."""
    name = data.draw(st.sampled_from(sorted(INVALID)))
    value = data.draw(st.sampled_from(INVALID[name]))
    note(f"{name}={value!r}")
    arguments = config["arguments"]
    if name in ("n_steps", "n_episodes"):
        arguments |= dict(n_steps=None, n_episodes=None)
    with pytest.raises(ValueError, match=name if name != "policy" else "(?i)policy"):
        policy = "MultiInputPolicy" if config["observations"] == "dictionary" else "MlpPolicy"
        REINFORCE(**dict(dict(policy=policy, env=make_env(config, World())) | arguments, **{name: value}))


# What is done to a model -----------------------------------------------------------------------------------------------------


def hyperparameters(model: REINFORCE) -> dict[str, Any]:
    """The arguments of the constructor, as the model has them."""
    own = {name: getattr(model, name) for name in signature(REINFORCE).parameters if name in vars(model)}
    return deepcopy({name: value for name, value in own.items() if name not in ("policy", "env", "device")})


def state(model: REINFORCE) -> Any:
    """A copy of all that an update changes, and of what nothing changes."""
    return deepcopy((dict(model.get_parameters()), model._n_updates, model._next_episode)), hyperparameters(model)


def copied(model: REINFORCE, **kwargs: Any) -> REINFORCE:
    """The model after a trip through a file."""
    file = io.BytesIO()
    model.save(file)
    return REINFORCE.load(file, device="cpu", **kwargs)


class Disturbance(BaseCallback):
    """
    Counts rollouts and episodes, remembers the model as it was at the start of each rollout, and does something once.

    :param action: what to do with the model
    :param delay: steps before that
    :param moment: "step", or the name of another method of a callback, which it then does at the first call
    """

    def __init__(
        self,
        world: World,
        action: Callable[[REINFORCE], Any] = lambda model: None,
        delay: int = 0,
        moment: str = "step",
    ):
        super().__init__()
        self.world = world
        self.action = action
        self.delay = delay
        self.moment = moment
        self.has_acted = self.has_finished = False
        self.n_started = 0
        #: Episodes of each rollout that has ended
        self.episodes: list[int] = []
        # Of steps that are not those of the rollout
        self.n_own_steps = 0

    @property
    def is_within_rollout(self) -> bool:
        return self.n_started > len(self.episodes)

    def _act(self, moment: str) -> bool:
        if moment != self.moment or self.has_acted:
            return True
        self.has_acted = True
        n_steps = self.world.n_steps
        try:
            return self.action(self.model) is not False  # type: ignore[arg-type]
        finally:
            self.n_own_steps += self.world.n_steps - n_steps

    def _on_training_start(self) -> None:
        self._act("training_start")

    def _on_rollout_start(self) -> None:
        self.n_started += 1
        self.n_episodes = 0
        self.n_at_start = self.num_timesteps
        self.at_start = state(self.model)  # type: ignore[arg-type]
        self._act("rollout_start")

    def _on_step(self) -> bool:
        self.n_episodes += int(self.locals["dones"].sum())
        self.delay -= 1
        return self.delay >= 0 or self._act("step")

    def _on_rollout_end(self) -> None:
        self.episodes.append(self.n_episodes)
        self._act("rollout_end")

    def _on_training_end(self) -> None:
        self.has_finished = True
        self._act("training_end")


def stop(model: REINFORCE) -> bool:
    return False


def fail(model: REINFORCE) -> None:
    raise Lost("in a callback")


def interrupt(model: REINFORCE) -> None:
    raise KeyboardInterrupt


def save(model: REINFORCE) -> None:
    model.save(io.BytesIO())


def act(model: REINFORCE) -> None:
    model.predict(model.observation_space.sample())


def move_weights(model: REINFORCE) -> None:
    """Put the same weights into other memory."""
    for parameter in model.policy.parameters():
        parameter.data = parameter.data.clone()


def change_weights_in_place(model: REINFORCE) -> None:
    for parameter in model.policy.parameters():
        parameter.data.mul_(1.0)


def load_weights(model: REINFORCE) -> None:
    model.policy.load_state_dict(deepcopy(model.policy.state_dict()))


def set_same_parameters(model: REINFORCE) -> None:
    model.set_parameters(deepcopy(model.get_parameters()))


#: What callbacks may do and learning does not notice
HARMLESS = [save, act, move_weights, change_weights_in_place, load_weights, set_same_parameters]


def lose(result: tuple) -> None:
    raise Lost("in an environment")


def never_end(result: tuple) -> tuple:
    return (*result[:2], False, False, result[4])


def with_entry(position: int, value: Any) -> Callable[[tuple], tuple]:
    """What ``step()`` or ``reset()`` is to return, but for one entry."""
    return lambda result: (*result[:position], value, *result[position + 1 :])


def not_finite(value: float) -> Callable[[tuple], tuple]:
    """An observation with a bad number in it; where it has no such numbers, the environment raises."""

    def spoil(result: tuple) -> tuple:
        observation = result[0]
        if isinstance(observation, dict):
            return ({**observation, "place": np.full_like(observation["place"], value)}, *result[1:])
        if not np.issubdtype(np.asarray(observation).dtype, np.floating):
            lose(result)
        return (np.full_like(observation, value), *result[1:])

    return spoil


#: Faults that must be refused, by what they happen to and the error that is raised
REFUSED: list[tuple[str, Callable[[tuple], Any], type[Exception]]] = [
    ("step", lose, RuntimeError),
    ("reset", lose, RuntimeError),
    ("step", never_end, RuntimeError),
    *[("step", with_entry(1, value), ValueError) for value in (np.nan, np.inf, -np.inf, 1e39)],
    *[("step", with_entry(1, value), RuntimeError) for value in (None, "one", 1j, [1.0, 2.0], np.zeros(2), 10**400)],
    *[("step", with_entry(4, value), RuntimeError) for value in (None, [])],
    *[("step", lambda result, value=value: value, RuntimeError) for value in (None, (), (0, 0.0, True, {}))],
    *[("reset", lambda result, value=value: value, RuntimeError) for value in (None, (), 3)],
    *[(when, not_finite(value), ValueError) for when in ("step", "reset") for value in (np.nan, np.inf)],
]
#: Faults of which some can be made sense of
STRANGE: list[tuple[str, Callable[[tuple], Any]]] = [
    *[
        (when, with_entry(0, value))
        for when in ("step", "reset")
        for value in (None, "one", 1e39, np.zeros(7), np.zeros((3, 1)), [0.5], {}, {"place": 1}, -1, 3, object())
    ],
    *[("step", with_entry(1, value)) for value in (True, np.float16(1), np.array(1.0), "1.5", th.tensor(1.0))],
    *[("step", with_entry(2, value)) for value in ("yes", 1, np.array([True]), np.zeros(2))],
    *[("step", with_entry(4, {"episode": None})), ("step", with_entry(4, {"TimeLimit.truncated": True}))],
]


class REINFORCEMachine(RuleBasedStateMachine):
    """
    A model, and another one that is left in peace: it learns as many updates, each with a ``learn()`` of its own.

    Where episodes are functions of the seed and their number, both always have the same parameters, and how many steps and
    episodes an update takes is counted without either.
    """

    @initialize(config=configs())
    def make(self, config: dict[str, Any]) -> None:
        self.config = config
        self.world = World()
        self.model = make_model(config, self.world)
        self.peaceful = make_model(config, World())
        self.hyperparameters = hyperparameters(self.model)
        #: What the counters of the model must be
        self.num_timesteps = self.n_updates = self.next_episode = 0

    @property
    def is_exact(self) -> bool:
        """Whether its episodes are functions of the seed and their number."""
        return self.model.seed is not None and self.config["env"] != "VecNormalize"

    def batch(self, number: int) -> tuple[int, int]:
        """Transitions of the batch that begins with an episode of this number, and the number of the next one."""
        env = FuzzEnv(self.config, World())

        def length(number: int) -> int:
            env.reset(seed=episode_seed(self.model.seed, number))
            return env.length

        arguments, n_envs = self.config["arguments"], self.config["n_envs"]
        first, n_transitions = number, 0
        remaining = {}
        for index in range(n_envs):
            remaining[index] = length(number)
            number += 1
        while remaining:
            n_transitions += len(remaining)
            for index in sorted(remaining):
                remaining[index] -= 1
                if remaining[index] == 0:
                    del remaining[index]
                    n_steps, n_episodes = (arguments[name] or 0 for name in ("n_steps", "n_episodes"))
                    if n_transitions < n_steps * n_envs or number - first < n_episodes:
                        remaining[index] = length(number)
                        number += 1
        return n_transitions, number

    # Learning

    def learn(
        self,
        total_timesteps: int,
        callback: Disturbance,
        reset: bool = False,
        log_interval: int | None = 1,
        is_predictable: bool = True,
        errors: tuple[type[BaseException], ...] = (),
    ) -> BaseException | None:
        """
        Learn, and compare what has been counted with what had to be.

        :param is_predictable: whether the lengths of episodes are those of their seeds
        :param errors: that may be raised
        :return: the error, if there was one
        """
        before, n_steps, error = self.model.num_timesteps, self.world.n_steps, None
        try:
            with patch("sb3_reinforce.episodes.rollout.ENDLESS_STEPS", 500):
                self.model.learn(total_timesteps, callback, log_interval, reset_num_timesteps=reset)  # type: ignore[arg-type]
        except errors as raised:
            error = raised
            # KNOWN: see test_a_bad_first_observation_is_not_seen_again
            getattr(self.model.env.unwrapped, "_at_start", {}).clear()  # type: ignore[union-attr]
        if self.world.fault.has_struck and self.config["env"] == "VecNormalize":
            # What was not finite stays in its statistics
            self.model.set_env(make_env(self.config, self.world))
        self.world.fault = Fault()
        start = 0 if reset else before
        # Where an environment has raised, the step of all was not finished, and does not count
        taken = self.world.n_steps - n_steps - callback.n_own_steps
        slack = 0 if callback.has_finished else self.model.n_envs
        assert taken - slack <= self.model.num_timesteps - start <= taken
        if callback.n_started and not callback.has_finished:
            assert_same(state(self.model), callback.at_start)
        # What raises is a rollout, or the update after it
        is_learned = callback.has_finished or callback.is_within_rollout
        learned = callback.episodes if is_learned else callback.episodes[:-1]
        if self.is_exact and is_predictable:
            number, expected = self.next_episode, start
            for n_episodes in learned:
                assert expected < start + total_timesteps
                n_transitions, next_number = self.batch(number)
                assert n_episodes == next_number - number
                number, expected = next_number, expected + n_transitions
            if callback.has_finished and not callback.is_within_rollout:
                assert self.model.num_timesteps == expected >= start + total_timesteps
        self.n_updates += len(learned)
        self.next_episode += sum(learned)
        self.num_timesteps = self.model.num_timesteps
        self.counters_are_right()
        return error

    @rule(total_timesteps=st.integers(0, 25), reset=st.booleans(), log_interval=st.sampled_from([1, 2, None]))
    def learns(self, total_timesteps: int, reset: bool, log_interval: int | None) -> None:
        self.learn(total_timesteps, Disturbance(self.world), reset, log_interval)

    @rule(action=st.sampled_from(HARMLESS), delay=st.integers(0, 12), reset=st.booleans())
    def learns_while_a_callback_does_something(self, action: Callable[[REINFORCE], Any], delay: int, reset: bool) -> None:
        self.learn(15, Disturbance(self.world, action, delay), reset)

    @rule(delay=st.integers(0, 12), reset=st.booleans())
    def learns_while_a_callback_changes_its_weights(self, delay: int, reset: bool) -> None:
        def shrink(model: REINFORCE) -> None:
            for parameter in model.policy.parameters():
                parameter.data.mul_(0.9)

        self.learn(15, Disturbance(self.world, shrink, delay), reset)
        self.renew_peaceful()

    @rule(delay=st.integers(0, 12), reset=st.booleans())
    def learns_while_a_callback_sets_another_environment(self, delay: int, reset: bool) -> None:
        self.learn(15, Disturbance(self.world, lambda model: model.set_env(make_env(self.config, self.world)), delay), reset)

    @rule(delay=st.integers(0, 12), reset=st.booleans())
    def a_callback_stops_learning(self, delay: int, reset: bool) -> None:
        callback = Disturbance(self.world, stop, delay)
        self.learn(15, callback, reset)
        assert callback.has_acted == callback.is_within_rollout

    @rule(
        action=st.sampled_from([fail, interrupt]),
        delay=st.integers(0, 12),
        moment=st.sampled_from(["step", "training_start", "rollout_start", "rollout_end", "training_end"]),
        reset=st.booleans(),
    )
    def a_callback_raises(self, action: Callable[[REINFORCE], Any], delay: int, moment: str, reset: bool) -> None:
        callback = Disturbance(self.world, action, delay, moment)
        error = self.learn(15, callback, reset, errors=(Lost, KeyboardInterrupt))
        assert callback.has_acted == (error is not None)

    @rule(delay=st.integers(0, 12), step=st.booleans())
    def a_callback_steps_the_training_environment(self, delay: int, step: bool) -> None:
        def meddle(model: REINFORCE) -> None:
            env = model.env
            assert env is not None
            if step:
                env.step(np.stack([env.action_space.sample()] * env.num_envs))
            else:
                env.reset()

        callback = Disturbance(self.world, meddle, delay)
        if self.config["env"] == "VecNormalize":
            # Nobody can tell
            return
        error = self.learn(15, callback, errors=(RuntimeError,))
        # If it was the last step of a rollout, nothing is lost
        assert error is None or "A callback has stepped or reset the training environment" in str(error)

    @rule(delay=st.integers(0, 6))
    def a_callback_saves_within_a_rollout(self, delay: int) -> None:
        saved: list[REINFORCE] = []
        callback = Disturbance(self.world, lambda model: (saved.append(copied(model)), stop(model))[1], delay)
        self.learn(15, callback)
        for model in saved:
            assert_same(state(model), callback.at_start)
            assert model.num_timesteps == callback.n_at_start

    @rule(fault=st.sampled_from(REFUSED), delay=st.integers(0, 10), reset=st.booleans())
    def an_environment_fails(self, fault: tuple[str, Callable, type[Exception]], delay: int, reset: bool) -> None:
        when, spoil, expected = fault
        self.world.fault = one_fault = Fault(spoil, when, delay)
        error = self.learn(15, Disturbance(self.world), reset, errors=(RuntimeError, ValueError))
        assert one_fault.has_struck == (error is not None)
        if error is not None:
            assert isinstance(error, expected) or isinstance(error.__cause__, Lost), error
            if spoil is never_end:
                assert re.search("has not ended after 5.. steps", str(error))
            elif self.config["env"] != "VecNormalize":
                assert str(error).startswith("Environment ")

    @rule(fault=st.sampled_from(STRANGE), delay=st.integers(0, 10))
    def an_environment_returns_something_strange(self, fault: tuple[str, Callable], delay: int) -> None:
        when, spoil = fault
        self.world.fault = one_fault = Fault(spoil, when, delay)
        n_updates = self.n_updates
        # KNOWN: only the first two are documented, see test_a_strange_last_observation_is_refused_with_its_place
        errors = (RuntimeError, ValueError, AssertionError, KeyError, TypeError)
        # It may have ended an episode
        error = self.learn(15, Disturbance(self.world), is_predictable=False, errors=errors)
        assert error is None or one_fault.has_struck
        if self.model._n_updates > n_updates and one_fault.has_struck:
            # What was made sense of has been learned from
            self.renew_peaceful()

    # Files, environments, parameters, seeds

    def renew_peaceful(self) -> None:
        self.peaceful = copied(self.model, env=make_env(self.config, World()))

    @rule()
    def is_saved_and_loaded(self) -> None:
        """The loaded one goes on in the place of the other."""
        before, pending = state(self.model), self.model._rollout_start
        self.model = copied(self.model, env=make_env(self.config, self.world))
        assert_same(state(self.model), before)
        # Steps of a rollout that was stopped are taken again
        self.num_timesteps = pending["num_timesteps"] if pending else self.num_timesteps
        self.renew_peaceful()

    @rule(n_envs=st.integers(1, 3))
    def is_loaded_with_another_number_of_environments(self, n_envs: int) -> None:
        if "Vec" not in self.config["env"]:
            return
        self.config["n_envs"] = n_envs
        self.is_saved_and_loaded()

    @rule()
    def is_loaded_without_an_environment(self) -> None:
        model = copied(self.model)
        with pytest.raises(ValueError, match="The model has no environment to learn from"):
            model.learn(1)
        model.predict(model.observation_space.sample())
        assert_same(state(model), state(self.model))

    @rule(kind=st.sampled_from(["env", "function", "DummyVecEnv", "VecNormalize"]))
    def gets_another_environment(self, kind: str) -> None:
        can_change = self.config["n_envs"] == 1 and self.config["observations"] in ("vector", "doubles")
        if can_change and kind != self.config["env"]:
            self.config["env"] = kind
            self.renew_peaceful()
        self.model.set_env(make_env(self.config, self.world))

    @contextmanager
    def refused(self, *errors: type[Exception]) -> Any:
        """What is done within is refused, and changes nothing."""
        before, env = state(self.model), self.model.env
        with pytest.raises(errors):
            yield
        assert_same(state(self.model), before)
        assert self.model.env is env

    @rule(data=st.data())
    def is_refused_an_environment_that_does_not_fit(self, data: Any) -> None:
        config = deepcopy(self.config)
        what = data.draw(st.sampled_from(["observations", "actions", "n_envs"]))
        if what == "n_envs":
            config |= dict(env="DummyVecEnv", n_envs=config["n_envs"] + 1)
            # SB3's
            with self.refused(AssertionError):
                self.model.set_env(make_env(config, World()))
            return
        others = sorted({"observations": OBSERVATION_SPACES, "actions": ACTION_SPACES}[what].keys() - {config[what]})
        config[what] = data.draw(st.sampled_from(others))
        config["env"] = "DummyVecEnv"
        with self.refused(ValueError):
            self.model.set_env(make_env(config, World()))
        with self.refused(ValueError):
            copied(self.model, env=make_env(config, World()))

    @rule()
    def its_own_parameters_are_set(self) -> None:
        set_same_parameters(self.model)

    @rule(data=st.data())
    def is_refused_parameters_that_do_not_fit(self, data: Any) -> None:
        parameters: dict[str, Any] = deepcopy(dict(self.model.get_parameters()))
        weights = parameters["policy"]
        name = data.draw(st.sampled_from(sorted(weights)))
        kind = data.draw(st.sampled_from(["missing", "shape", "unknown", "no optimizer", "unknown object"]))
        # Those before it must not be set either
        first = next(iter(weights))
        if name != first:
            weights[first] = weights[first] + 1
        if kind == "missing":
            del weights[name]
        elif kind == "shape":
            weights[name] = th.zeros(*weights[name].shape, 2)
        elif kind == "unknown":
            weights["unknown"] = th.zeros(1)
        elif kind == "no optimizer":
            del parameters["policy.optimizer"]
        else:
            parameters["unknown"] = {}
        with self.refused(ValueError, RuntimeError):
            self.model.set_parameters(parameters)

    @rule(value=st.sampled_from([np.nan, np.inf]))
    def a_weight_that_is_not_finite_is_not_learned_from(self, value: float) -> None:
        parameters = deepcopy(self.model.get_parameters())
        with th.no_grad():
            self.model.policy.action_net.bias[0] = value
        n_steps = self.world.n_steps
        # Squashed, it is finite until there is a gradient
        with pytest.raises(ValueError, match=r"policy's output is not finite|gradient of update \d+ is not finite"):
            self.model.learn(1, reset_num_timesteps=False)
        assert self.world.n_steps == n_steps or self.model.policy.squash_output
        self.num_timesteps = self.model.num_timesteps
        self.model.set_parameters(parameters)

    @rule(seed=st.sampled_from([None, 3, 2**31]))
    def is_seeded(self, seed: int | None) -> None:
        had_none = self.model.seed is None
        for model in (self.model, self.peaceful):
            model.set_random_seed(seed)
        if seed is not None:
            self.hyperparameters["seed"] = seed
            if had_none:
                self.renew_peaceful()

    # Prediction

    @rule(deterministic=st.booleans(), n=st.integers(1, 3))
    def predicts(self, deterministic: bool, n: int) -> None:
        space = deepcopy(self.model.observation_space)
        space.seed(0)
        observations = [space.sample() for _ in range(n)]
        batch = (
            {key: np.stack([observation[key] for observation in observations]) for key in space.spaces}
            if isinstance(space, spaces.Dict)
            else np.stack(observations)
        )
        before = state(self.model)
        chosen = [self.model.predict(batch, deterministic=deterministic)[0] for _ in range(2)]
        assert all(self.model.action_space.contains(action) for action in chosen[0])
        if deterministic:
            np.testing.assert_array_equal(*chosen)
        assert_same(state(self.model), before)

    @rule(observation=st.sampled_from([None, "one", np.zeros((2, 3, 5)), {"unknown": np.zeros(2)}]))
    def is_refused_an_observation_of_another_shape(self, observation: Any) -> None:
        # SB3's errors
        with self.refused(Exception):
            self.model.predict(observation)

    # What always holds

    @invariant()
    def weights_are_finite(self) -> None:
        def check(value: Any, name: str) -> None:
            if isinstance(value, dict):
                for key, entry in value.items():
                    check(entry, f"{name}.{key}")
            # These are bounds of the action space
            elif isinstance(value, th.Tensor) and not name.endswith((".features.low", ".features.high")):
                assert th.isfinite(value).all(), name

        check(dict(self.model.get_parameters()), "")

    @invariant()
    def counters_are_right(self) -> None:
        model = self.model
        assert (model.num_timesteps, model._n_updates) == (self.num_timesteps, self.n_updates)
        assert model._next_episode == self.next_episode

    @invariant()
    def hyperparameters_are_those_that_were_given(self) -> None:
        assert hyperparameters(self.model) == self.hyperparameters

    @invariant()
    def it_is_what_it_would_be_in_peace(self) -> None:
        if not self.is_exact:
            return
        while self.peaceful._n_updates < self.model._n_updates:
            self.peaceful.learn(1, reset_num_timesteps=False)
        assert_same(state(self.model), state(self.peaceful))


MACHINE = dict(stateful_step_count=20, suppress_health_check=list(HealthCheck))


def test_whatever_is_done_to_a_model_in_whatever_order():
    run_state_machine_as_test(REINFORCEMachine, settings=settings(max_examples=100, **MACHINE))  # type: ignore[arg-type]


@pytest.mark.slow
def test_whatever_is_done_to_a_model_in_whatever_order_for_longer():
    run_state_machine_as_test(REINFORCEMachine, settings=settings(max_examples=3000, **MACHINE))  # type: ignore[arg-type]


# Files -----------------------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = dict(
    env="DummyVecEnv",
    n_envs=2,
    observations="vector",
    actions="pair",
    max_length=6,
    times_out=True,
    arguments=dict(n_episodes=6, policy_kwargs=dict(net_arch=[4]), baseline_kwargs=dict(n_units=3), seed=0),
)


@functools.cache
def trained_and_saved() -> tuple[REINFORCE, bytes]:
    model = make_model(SMALL, World(), target_kl=None, seed=0).learn(60)
    file = io.BytesIO()
    model.save(file)
    return model, file.getvalue()


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_file_is_refused_or_its_damage_means_nothing(data: Any):
    """Bytes that are changed, cut off, lost or put in between, anywhere, or among the last where the archive has its names."""
    model, content = trained_and_saved()
    size = len(content)
    start = data.draw(st.one_of(st.integers(0, size - 1), st.integers(size - 600, size - 1)))
    n_lost = data.draw(st.one_of(st.integers(0, 50), st.just(size)))
    damaged = content[:start] + data.draw(st.binary(max_size=50)) + content[start + n_lost :]
    try:
        loaded = REINFORCE.load(io.BytesIO(damaged), device="cpu")
    except ValueError as error:
        assert "is no complete model file" in str(error)
    else:
        assert_same(state(loaded), state(model))


# What is not as it should be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 0])
def test_a_bad_first_observation_is_not_seen_again(seed: int | None):
    world = World()
    model = make_model(SMALL, world, seed=seed).learn(1)
    world.fault = Fault(not_finite(np.nan), "reset")
    with pytest.raises(ValueError, match="at step 0 of episode"):
        model.learn(1, reset_num_timesteps=False)
    assert model.learn(1, reset_num_timesteps=False)._n_updates == 2


@pytest.mark.parametrize("advantage", ["q", "advantage"])
def test_action_values_of_several_choices(advantage: str):
    assert make_model(SMALL | dict(observations="choices"), World(), advantage=advantage).learn(1)._n_updates == 1


@pytest.mark.parametrize("target_kl", [None, 0.02])
def test_parameters_that_a_callback_has_replaced_are_learned(target_kl: float | None):
    """Or refused."""

    def replace(model: REINFORCE) -> None:
        for module in model.policy.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, th.nn.Parameter(parameter.detach().clone()))

    model = make_model(SMALL, World(), target_kl=target_kl)
    try:
        model.learn(1, Disturbance(World(), replace))
    except (RuntimeError, ValueError) as error:
        assert "optimizer" in str(error)
    before = deepcopy(list(model.policy.parameters()))
    model.learn(1)
    assert not any(map(th.equal, before, model.policy.parameters()))


@pytest.mark.parametrize(
    "observation",
    [np.array(["a", "b", "c"]), np.array([0, 0, object()]), {}, np.zeros(4)],
    ids=["text", "objects", "dict", "shape"],
)
def test_a_strange_last_observation_is_refused_with_its_place(observation: Any):
    world = World()
    model = make_model(SMALL | dict(n_envs=1, max_length=1), world)
    world.fault = Fault(lambda result: (observation, *result[1:2], False, True, {}))
    with pytest.raises((RuntimeError, ValueError), match=r"Environment 0 .* at step 1 of episode 0"):
        model.learn(1)


def test_an_environment_may_use_the_memory_of_its_observations_again():
    class Thrifty(FuzzEnv):
        memory = np.zeros(3, np.float32)

        def _observe(self) -> Any:
            self.memory[...] = super()._observe()
            return self.memory

    models = [
        REINFORCE("MlpPolicy", Monitor(cls(SMALL, World())), device="cpu", **SMALL["arguments"]).learn(60)
        for cls in (FuzzEnv, Thrifty)
    ]
    assert_same(*map(state, models))
