"""
Random sequences of actions on a model: weights stay finite, counters stay right, and refused actions change nothing. With a
seed, episodes and updates are always the same.
"""

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_reinforce import REINFORCE
from tests.envs import RandomEnv
from tests.runs.common import CHOICE, PAIR, VECTOR, assert_same, state

OBSERVATIONS = [VECTOR, spaces.MultiDiscrete([2, 3]), spaces.Dict(vec=VECTOR, choice=spaces.Discrete(2))]
ACTIONS = [PAIR, spaces.Box(-np.inf, np.inf, (1,)), CHOICE, spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)]


class Lost(Exception):
    """Raised by the environments and callbacks of these tests."""


class World:
    """The number of steps of all environments of a model, and a fault that happens once in one of them."""

    def __init__(self) -> None:
        self.n_steps = 0
        self.plan()

    def plan(self, spoil: Callable[[tuple], Any] | None = None, when: str = "step", delay: int = 0) -> None:
        """Let ``spoil`` replace the result of a step or reset after ``delay`` of these, or raise."""
        self.spoil, self.when, self.delay = spoil, when, delay
        self.has_struck = self.has_struck_last = False

    def result(self, when: str, result: tuple) -> Any:
        if self.spoil is None or when != self.when or self.has_struck:
            return result
        self.delay -= 1
        if self.delay >= 0:
            return result
        self.has_struck, self.has_struck_last = True, when == "step" and (result[2] or result[3])
        return self.spoil(result)


class FuzzEnv(RandomEnv):
    """Observations depend on the seed alone."""

    def __init__(self, config: dict[str, Any], world: World):
        super().__init__(config["observations"], config["actions"], config["max_length"])
        self.world = world

    def reset(self, **kwargs: Any) -> Any:
        return self.world.result("reset", super().reset(**kwargs))

    def step(self, action: Any) -> Any:
        self.world.n_steps += 1
        # Actions on observations that are NaN are NaN
        return self.world.result("step", super().step(np.nan_to_num(action)))


def make_env(config: dict[str, Any], world: World) -> DummyVecEnv:
    return DummyVecEnv([lambda: Monitor(FuzzEnv(config, world))] * config["n_envs"])


def make_model(config: dict[str, Any], world: World) -> REINFORCE:
    policy = "MultiInputPolicy" if isinstance(config["observations"], spaces.Dict) else "MlpPolicy"
    return REINFORCE(policy, make_env(config, world), device="cpu", **config["arguments"])


def some(*values: Any) -> st.SearchStrategy:
    return st.sampled_from(values)


@st.composite
def configs(draw: Callable[..., Any]) -> dict[str, Any]:
    """Environments, and valid arguments of a model."""
    config = dict(n_envs=draw(some(1, 2, 3)), observations=draw(some(*OBSERVATIONS)), max_length=draw(some(1, 6)))
    actions, baseline = draw(some(*ACTIONS)), draw(some("linear", "random_features", None))
    n_steps, n_episodes = draw(some((1, None), (5, None), (12, None), (None, 1), (None, 4), (9, 3)))
    arguments = dict(
        n_steps=n_steps,
        n_episodes=n_episodes,
        target_kl=draw(some(None, 0.02, "auto")),
        use_sde=isinstance(actions, spaces.Box) and draw(st.booleans()),
        sde_sample_freq=draw(some(-1, 3)),
        advantage=draw(some("monte_carlo", "q", "advantage", "td")) if baseline else "monte_carlo",
        baseline=baseline,
        baseline_kwargs=dict(n_units=3) if baseline == "random_features" else {},
        normalize_observations=draw(st.booleans()),
        policy_kwargs=dict(net_arch=draw(some([], [4]))),
        seed=draw(some(None, 0, 7)),
    )
    return config | dict(actions=actions, arguments=arguments)


class Disturbance(BaseCallback):
    """Counts rollouts and episodes, copies the state at the start of each rollout, and calls ``action`` once."""

    def __init__(self, action: Callable[[REINFORCE], Any] = lambda model: None, moment: str = "step", delay: int = 0):
        super().__init__()
        self.action, self.moment, self.delay = action, moment, delay
        self.has_acted = self.has_finished = False
        self.n_started = self.n_episodes = 0
        #: Number of episodes of each complete rollout
        self.episodes: list[int] = []

    def _act(self, moment: str) -> bool:
        if moment != self.moment or self.has_acted:
            return True
        self.has_acted = True
        return self.action(self.model) is not False  # type: ignore[arg-type]

    def _on_training_start(self) -> None:
        self._act("training_start")

    def _on_rollout_start(self) -> None:
        self.n_started, self.n_episodes = self.n_started + 1, 0
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


def lose(*args: Any) -> Any:
    raise Lost


def interrupt(model: REINFORCE) -> None:
    raise KeyboardInterrupt


def stop(model: REINFORCE) -> bool:
    return False


#: Actions of callbacks: they do not change training
CALLS: list[Callable[[REINFORCE], Any]] = [
    lambda model: model.save(io.BytesIO()),
    lambda model: model.predict(deepcopy(model.observation_space).sample()),
    lambda model: model.set_parameters(deepcopy(model.get_parameters())),
    *(stop, lose, interrupt),
]


def with_entry(position: int, value: Any) -> Callable[[tuple], tuple]:
    """Replace one entry of the result of ``step()`` or ``reset()``."""
    return lambda result: (*result[:position], value, *result[position + 1 :])


def with_nan(result: tuple) -> tuple:
    """Replace an observation by NaN; raise an error if it has no floats."""
    observation = result[0]
    if isinstance(observation, dict):
        return ({**observation, "vec": observation["vec"] * np.nan}, *result[1:])
    return (observation * np.nan, *result[1:]) if observation.dtype == np.float32 else lose()


#: Faults: method, result and type of the error
FAULTS: list[tuple[str, Callable[[tuple], Any], Any]] = [
    *[(when, lose, Lost) for when in ("step", "reset")],
    *[(when, with_nan, (ValueError, Lost)) for when in ("step", "reset")],
    *[("step", with_entry(1, value), ValueError) for value in (np.nan, -np.inf, 1e39)],
    *[("step", with_entry(position, None), Exception) for position in (1, 4)],
    *[(when, lambda result: None, Exception) for when in ("step", "reset")],
]
moments = some("step", "training_start", "rollout_start", "rollout_end", "training_end")
delays = st.integers(0, 12)


class REINFORCEMachine(RuleBasedStateMachine):
    """
    A model, and an undisturbed one that learns the same number of updates, with one call of ``learn()`` each. If episodes
    depend on the seed and their number alone, both always have the same parameters.
    """

    @initialize(config=configs())
    def make(self, config: dict[str, Any]) -> None:
        self.config, self.world = config, World()
        self.model, self.undisturbed = make_model(config, self.world), make_model(config, World())
        #: Expected counters of the model
        self.num_timesteps = self.n_updates = self.next_episode = 0

    def learn(self, callback: Disturbance, reset: bool = False, errors: Any = ()) -> BaseException | None:
        """Learn, compare all counters with their expected values, and return the error that was raised."""
        before, n_steps, error = self.model.num_timesteps, self.world.n_steps, None
        if reset:
            # The steps of the update begin anew
            self.undisturbed._n_iterations = 0
        try:
            self.model.learn(15, callback, reset_num_timesteps=reset)
        except errors as raised:
            error = raised
            assert self.model._last_obs is None or callback.has_finished
        # The step of all environments in which one raised an error does not count
        taken, slack = self.world.n_steps - n_steps, 0 if callback.has_finished else self.model.n_envs
        assert taken - slack <= self.model.num_timesteps - (0 if reset else before) <= taken
        if callback.n_started and not callback.has_finished:
            assert_same(state(self.model), callback.at_start)
        # An error after the end of a rollout was raised in the update
        is_learned = callback.has_finished or callback.n_started > len(callback.episodes)
        learned = callback.episodes if is_learned else callback.episodes[:-1]
        self.n_updates += len(learned)
        self.next_episode += sum(learned)
        self.num_timesteps = self.model.num_timesteps
        return error

    @rule(action=some(*CALLS, None), moment=moments, delay=delays, reset=st.booleans())
    def a_callback_acts(self, action: Callable | None, moment: str, delay: int, reset: bool) -> None:
        """Or sets another environment."""
        callback = Disturbance(action or (lambda model: model.set_env(make_env(self.config, self.world))), moment, delay)
        error = self.learn(callback, reset, errors=(Lost, KeyboardInterrupt))
        assert (error is not None) == (callback.has_acted and action in (lose, interrupt))
        if action is stop:
            is_stopped = callback.n_started > len(callback.episodes)
            assert is_stopped == (callback.has_acted and moment == "step")

    @rule(fault=some(*FAULTS), delay=delays, reset=st.booleans())
    def an_environment_fails(self, fault: tuple[str, Callable, Any], delay: int, reset: bool) -> None:
        when, spoil, expected = fault
        self.world.plan(spoil, when, delay)
        error = self.learn(Disturbance(), reset, errors=Exception)
        # The last observation of an episode may be ignored
        assert self.world.has_struck == (error is not None) or self.world.has_struck_last
        if error:
            assert isinstance(error, expected), error
            assert any("nvironment" in text for text in (str(error), *getattr(error, "__notes__", []))), error
        self.world.plan()

    def copied(self, world: World) -> REINFORCE:
        """Save and load the model."""
        file = io.BytesIO()
        self.model.save(file)
        return REINFORCE.load(file, make_env(self.config, world), device="cpu")

    @rule(n_envs=some(1, 2, 3))
    def is_saved_and_loaded(self, n_envs: int) -> None:
        """Continue with the loaded model, and with another number of environments."""
        self.config["n_envs"] = n_envs
        before, pending = state(self.model), self.model._rollout_start
        self.model = self.copied(self.world)
        assert_same(state(self.model), before)
        # The steps of an unfinished rollout are repeated
        self.num_timesteps = pending["num_timesteps"] if pending else self.num_timesteps
        self.undisturbed = self.copied(World())

    @rule(seed=some(None, 3, 2**31))
    def is_seeded(self, seed: int | None) -> None:
        had_none = self.model.seed is None
        for model in (self.model, self.undisturbed):
            model.set_random_seed(seed)
        if had_none:
            self.undisturbed = self.copied(World())

    @invariant()
    def weights_are_finite(self) -> None:
        for name, value in self.model.policy.state_dict().items():
            # Bounds of the action space may be infinite
            assert name.endswith((".low", ".high")) or th.isfinite(value).all(), name

    @invariant()
    def counters_are_right(self) -> None:
        counters = self.model.num_timesteps, self.model._n_updates, self.model._next_episode
        assert counters == (self.num_timesteps, self.n_updates, self.next_episode)

    @invariant()
    def it_equals_the_undisturbed_model(self) -> None:
        if self.model.seed is not None:
            while self.undisturbed._n_updates < self.model._n_updates:
                self.undisturbed.learn(1, reset_num_timesteps=False)
            assert_same(state(self.model), state(self.undisturbed))


# NumPy warns of values that are not finite
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("max_examples", [12, pytest.param(500, marks=pytest.mark.slow)])
def test_any_sequence_of_actions_leaves_a_model_correct(max_examples: int):
    # Shrinking takes minutes
    kwargs: Any = dict(stateful_step_count=20, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    run_state_machine_as_test(REINFORCEMachine, settings=settings(max_examples=max_examples, **kwargs))  # type: ignore[arg-type]
