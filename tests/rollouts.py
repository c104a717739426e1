"""Helpers that record rollouts, used by the tests of the engine."""

from collections.abc import Callable
from functools import partialmethod
from typing import Any

import gymnasium as gym
import numpy as np
from hypothesis import strategies as st
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_reinforce import REINFORCE, EpisodeVecEnv
from tests.envs import ScriptedEnv

#: Arguments of a model that is created quickly, for batches of n_steps
SMALL: dict[str, Any] = dict(n_episodes=None, policy_kwargs=dict(net_arch=[]), baseline=None)
#: More steps than any test takes
LONG = 10**9

WRAPPERS: dict[str, Callable[[VecEnv], VecEnv]] = {
    "VecNormalize": lambda env: VecNormalize(env, norm_obs=False),
    "VecFrameStack": lambda env: VecFrameStack(env, 2),
    "VecMonitor": VecMonitor,
}


#: Ways to use the training environment outside of a rollout
USES: dict[str, Callable[[REINFORCE, VecEnv], Any]] = {
    "evaluate_policy": lambda model, env: evaluate_policy(model, env, n_eval_episodes=3, warn=False),
    "step": lambda model, env: [env.step(np.zeros((env.num_envs, 2))) for _ in range(5)],
    "reset": lambda model, env: env.reset(),
}

#: Strategies of hypothesis: lengths of the episodes of each sub-environment, and the minimums of a batch
lengths = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=8)
sizes = st.one_of(st.none(), st.integers(1, 12))
targets = st.fixed_dictionaries(dict(n_steps=sizes, n_episodes=sizes)).filter(lambda target: set(target.values()) != {None})


class Reference:
    """
    Episodes of a batch, computed one step at a time.

    :param lengths_of_each: lengths of the episodes of each sub-environment, repeated
    :param steps_idle_envs: whether sub-environments are stepped while they are idle
    """

    def __init__(self, lengths_of_each: list[list[int]], steps_idle_envs: bool):
        self.lengths_of_each = lengths_of_each
        self.steps_idle_envs = steps_idle_envs
        self.at = [(0, 0)] * len(lengths_of_each)
        self.next_number = 0

    def length(self, env: int, episode: int) -> int:
        return self.lengths_of_each[env][episode % len(self.lengths_of_each[env])]

    def step(self, active: list[bool] | None = None) -> list[bool]:
        dones = [False] * len(self.at)
        for env, (episode, step) in enumerate(self.at):
            if self.steps_idle_envs or active is None or active[env]:
                dones[env] = step + 1 == self.length(env, episode)
                self.at[env] = (episode + 1, 0) if dones[env] else (episode, step + 1)
        return dones

    def rollout(self, at_start: list[bool], n_steps: int | None, n_episodes: int | None) -> tuple[list, list, list[bool]]:
        """Return (sub-environment, episode, number) of each episode, active ones by step, and the dones of the last step."""
        active, collected, n_steps, n_episodes = [False] * len(self.at), 0, n_steps or 0, n_episodes or 0
        episodes: list[tuple[int, int, int]] = []
        activity: list[list[bool]] = []
        dones = at_start
        while True:
            for env in np.flatnonzero(dones).tolist():
                active[env] = not activity or collected < n_steps * len(self.at) or len(episodes) < n_episodes
                if active[env]:
                    episodes.append((env, self.at[env][0], self.next_number))
                    self.next_number += 1
            if not any(active) and collected >= n_steps * len(self.at) and len(episodes) >= n_episodes:
                return sorted(episodes), activity, dones
            activity.append(list(active))
            collected += sum(active)
            dones = self.step(active)


class Recorder(BaseCallback):
    """
    Copies rollouts, and the local variables of each step.

    :param n_rollouts: ends ``learn(LONG)`` after this number of rollouts
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
        names = ("observations", "actions", "rewards", "episode_starts")
        counted = {name: self.model.logger.name_to_value[f"rollout/{name}"] for name in ("episodes", "idle_fraction")}
        counted["num_timesteps"] = self.model.num_timesteps
        self.rollouts.append({name: np.array(getattr(buffer, name)) for name in names} | counted)
        if len(self.rollouts) == self.n_rollouts:
            self.model.num_timesteps += LONG


class StopAt(BaseCallback):
    """Stops training at a call."""

    def __init__(self, n_calls: int):
        super().__init__()
        self.last = n_calls

    def _on_step(self) -> bool:
        return self.n_calls < self.last


class Do(BaseCallback):
    """
    Calls a function of the model.

    :param when: "on_training_start", "on_rollout_start", "on_rollout_end" or "on_training_end"; or the number of a step
    """

    def __init__(self, when: str | int, action: Callable[[REINFORCE], Any]) -> None:
        super().__init__()
        self.when = when
        self.action = action

    def _do(self, when: str | int) -> None:
        if when == self.when:
            self.action(self.model)  # type: ignore[arg-type]

    def _on_step(self) -> bool:
        self._do(self.n_calls)
        return True


for _when in ("on_training_start", "on_rollout_start", "on_rollout_end", "on_training_end"):
    setattr(Do, f"_{_when}", partialmethod(Do._do, _when))


def collect(env: VecEnv | gym.Env, n_rollouts: int = 1, **kwargs: Any) -> tuple[Recorder, REINFORCE]:
    """Collect rollouts, one with each call of learn()."""
    recorder = Recorder()
    model = REINFORCE("MlpPolicy", env, **(SMALL | kwargs))
    for _ in range(n_rollouts):
        model.learn(1, callback=recorder, reset_num_timesteps=False)
    return recorder, model


def episodes_of(rollout: dict[str, Any], name: str = "observations") -> list[np.ndarray]:
    """Split an array of a rollout into episodes."""
    return np.split(rollout[name], np.flatnonzero(rollout["episode_starts"])[1:])


def check_whole(rollouts: list[dict[str, Any]]) -> None:
    """Check that all episodes of ``ScriptedEnv`` and ``Simulators`` are whole; the last of stacked frames counts."""
    assert rollouts
    for rollout in rollouts:
        for episode in episodes_of(rollout):
            np.testing.assert_array_equal(episode[:, -1], np.arange(len(episode)))
            assert len(set(map(tuple, episode[:, -3:-1]))) == 1


def assert_same(one: Any, other: Any) -> None:
    """Values, types and structure of two nestings are the same to the bit, except for times of monitors."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one.keys() - {"t"}:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype and np.array_equal(one, other)
    else:
        assert one == other


def state_of(model: REINFORCE) -> np.ndarray:
    """Copy weights, baseline and statistics into a vector."""
    return np.concatenate([value.numpy().ravel().copy() for value in model.policy.state_dict().values()])


def episode_vec_env(lengths_of_each: list[list[int]]) -> EpisodeVecEnv:
    """Make an ``EpisodeVecEnv`` of ``ScriptedEnv``, one for each list of lengths."""
    return EpisodeVecEnv([lambda lengths=ls, i=i: ScriptedEnv(lengths, i) for i, ls in enumerate(lengths_of_each)])


def spoil_at(what: str, episode: int, step: int, value: Any) -> Callable:
    """Make an argument ``spoil`` of ``ScriptedEnv`` that replaces one value, or raises an exception."""

    def spoil(a_what: str, an_episode: int, a_step: int, a_value: Any) -> Any:
        if (a_what, an_episode, a_step) != (what, episode, step):
            return a_value
        if isinstance(value, Exception):
            raise value
        if isinstance(a_value, dict):
            return a_value | {"b": np.full_like(a_value["b"], value)}
        return np.full_like(a_value, value) if isinstance(a_value, np.ndarray) else value

    return spoil
