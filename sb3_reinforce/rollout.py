"""Collecting whole episodes from a ``VecEnv`` of any number of environments."""

import math
import time
import traceback
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecTransposeImage

from sb3_reinforce.buffers import EpisodeRolloutBuffer
from sb3_reinforce.sampling import all_finite, make_actor, reset_noise
from sb3_reinforce.vec_env import EpisodeVecEnv


class EpisodeTracker:
    """
    Which environments are within an episode of the rollout, which are idle, and when to start no more episodes.

    An environment that ends an episode starts another while fewer than ``min_transitions`` transitions have been collected,
    or fewer than ``min_episodes`` episodes started; after that it is idle. Every episode that is started is finished, so
    whether an episode gets into the batch never depends on the episode itself: the batch is not biased towards short ones.

    :param n_envs: number of environments
    :param min_transitions: transitions wanted, over all environments
    :param min_episodes: episodes wanted, over all environments
    :param max_episode_steps: an episode that takes as many steps is cut there
    """

    def __init__(self, n_envs: int, min_transitions: int, min_episodes: int, max_episode_steps: int):
        self.min_transitions = min_transitions
        self.min_episodes = min_episodes
        self.max_episode_steps = max_episode_steps
        #: (n_envs,) environments within an episode. Never changed in place: what was read from here stays as it was
        self.active = np.zeros(n_envs, dtype=bool)
        #: (n_envs,) environments whose last episode was cut
        self.cut = np.zeros(n_envs, dtype=bool)
        #: (n_envs,) step of the rollout with which the current episode began, and number of episodes so far
        self.began = np.zeros(n_envs, dtype=int)
        self.episodes = np.zeros(n_envs, dtype=int)
        self.n_steps = self.n_active = self.n_transitions = self.n_started = 0
        #: No episode reaches max_episode_steps before this step
        self._next_cut = max_episode_steps

    def wants_more(self) -> bool:
        """Whether another episode has to be started."""
        return self.n_transitions < self.min_transitions or self.n_started < self.min_episodes

    def start_all(self) -> None:
        """All environments are at the start of an episode."""
        self.active = np.ones_like(self.active)
        self.cut = np.zeros_like(self.cut)
        self.began[:] = self.n_steps
        self._next_cut = self.n_steps + self.max_episode_steps
        self.episodes += 1
        self.n_active = len(self.active)
        self.n_started += self.n_active

    def step(self, dones: np.ndarray) -> bool:
        """
        Take note of one step of all environments.

        :param dones: (n_envs,) active environments whose episode has ended, and that are at the start of another
        :return: whether an episode was cut in this step. Its environment is idle from now on, because only all environments
            together can be reset
        """
        self.n_transitions += self.n_active
        self.n_steps += 1
        # Hardly any step ends an episode, and this function is called at every step
        if not any_true(dones) and self.n_steps < self._next_cut:
            return False
        cut = self.active & ~dones & (self.n_steps - self.began >= self.max_episode_steps)
        self.cut |= cut
        self.active = self.active.copy()
        for idx in np.flatnonzero(dones | cut):
            if self.wants_more() and not cut[idx]:
                self.began[idx] = self.n_steps
                self.episodes[idx] += 1
                self.n_started += 1
            else:
                self.active[idx] = False
                self.n_active -= 1
        self._next_cut = int(self.began[self.active].min(initial=self.n_steps)) + self.max_episode_steps
        return bool(cut.any())


def any_true(flags: np.ndarray) -> bool:
    """``flags.any()`` for a handful of environments, in a tenth of its time."""
    return True in flags.tolist()


def collect_episodes(
    model: OnPolicyAlgorithm,
    env: VecEnv,
    callback: BaseCallback,
    rollout_buffer: EpisodeRolloutBuffer,
    rng: np.random.Generator,
    episodes: EpisodeTracker,
    bootstrap_timeouts: bool,
) -> bool:
    """
    Fill a buffer with whole episodes, as many as an :class:`EpisodeTracker` wants.

    Most ``VecEnv`` cannot step some of their members: idle ones are stepped along, which counts as ``num_timesteps``, but
    what they return goes nowhere (an observation that is not finite is refused all the same). For them, callbacks see a
    reward of 0, no end of an episode, and empty infos. An :class:`~sb3_reinforce.vec_env.EpisodeVecEnv` leaves them alone.

    :param model: the algorithm: its policy acts, its counters and statistics are kept up to date
    :param env: the environments
    :param callback: called at the start of the rollout and after every step, with the local variables of this function
    :param rollout_buffer: is emptied, then filled
    :param rng: supplies the randomness of actions and, when the model has a seed, of the environments
    :param episodes: a new tracker
    :param bootstrap_timeouts: whether, at a time-out, the baseline's value of the last observation stands for the rewards
        that would have followed (Pardo et al., 2018; SB3 issue 633)
    :return: False if the callback stopped the rollout; it cannot be learned from then
    :raises ValueError: when a reward, an observation or the policy's output is NaN or infinite
    :raises RuntimeError: when an environment raises
    """
    policy = model.policy
    policy.set_training_mode(False)
    rollout_buffer.reset()
    if model.use_sde:
        reset_noise(policy, env.num_envs, rng)
    # Environments that ended an episode with the last rollout are at the start of another. A seeded model resets them all
    # the same, so that their seeds depend on the iteration alone and not on what happened before
    at_start = np.asarray(model._last_episode_starts, dtype=bool)
    # Whatever may end this rollout early, the environments are somewhere within episodes then
    model._last_episode_starts = np.zeros(env.num_envs, dtype=bool)
    callback.on_rollout_start()
    # After the callback, which may change the policy
    act = make_actor(policy, rng)

    # Callbacks find the steps of the rollout under the name n_steps, as in A2C
    n_steps = n_env_steps = 0
    episode_env = find_episode_vec_env(env)
    while episodes.wants_more():
        if model.seed is not None or not np.all(at_start):
            model._last_obs = reset_env(env, None if model.seed is None else int(rng.integers(2**31)))
        episodes.start_all()
        episode_starts = np.ones(env.num_envs, dtype=bool)
        check_finite("observation", model._last_obs, episodes)

        while episodes.n_active:
            if model.use_sde and model.sde_sample_freq > 0 and n_steps % model.sde_sample_freq == 0:
                reset_noise(policy, env.num_envs, rng)
            actions, clipped_actions, values = act(model._last_obs)  # type: ignore[arg-type]
            new_obs, rewards, dones, infos = step_env(env, clipped_actions, episodes, episode_env)
            at_start = dones
            active = episodes.active
            if episodes.n_active < env.num_envs:
                rewards, dones = np.where(active, rewards, 0.0), dones & active
                infos = [info if is_active else {} for info, is_active in zip(infos, active, strict=True)]
            n_stepped = env.num_envs if episode_env is None else episodes.n_active
            model.num_timesteps += n_stepped
            n_env_steps += n_stepped
            n_steps += 1

            callback.update_locals(locals())
            if not callback.on_step():
                return False
            model._update_info_buffer(infos, dones)

            is_cut = episodes.step(dones)
            if is_cut:
                cut = np.flatnonzero(active & episodes.cut)
                record_cut(model, env, infos, cut)
                warn_about_cut(model, env, episodes.max_episode_steps, cut)
            if bootstrap_timeouts and (is_cut or any_true(dones)):
                rewards = rewards + model.gamma * timeout_values(policy, infos, new_obs, episodes.cut & active)
            rollout_buffer.add(model._last_obs, actions, rewards, episode_starts, active, values)  # type: ignore[arg-type]
            episode_starts = dones
            model._last_obs = new_obs
        if episode_env is not None:
            at_start = ~episodes.cut

    model._last_episode_starts = at_start
    rollout_buffer.finish()
    model.logger.record("rollout/episodes", episodes.n_started)
    model.logger.record("rollout/transitions", episodes.n_transitions)
    model.logger.record("rollout/idle_fraction", 1.0 - episodes.n_transitions / n_env_steps)
    return True


def find_episode_vec_env(env: VecEnv) -> EpisodeVecEnv | None:
    """The environments below, if they can leave some alone, and no wrapper in between would mistake that for steps."""
    while type(env) is VecTransposeImage:
        env = env.venv
    return env if isinstance(env, EpisodeVecEnv) else None


def timeout_values(
    policy: ActorCriticPolicy, infos: list[dict[str, Any]], new_obs: np.ndarray | dict[str, np.ndarray], cut: np.ndarray
) -> np.ndarray:
    """
    The baseline's value of what follows a time-out; 0 where there was none.

    :param policy: has the baseline
    :param infos: (n_envs) of one step
    :param new_obs: (n_envs, ...) of the same step
    :param cut: (n_envs,) environments whose episode was cut without their taking part in it
    :return: (n_envs,) discounted rewards expected from the last observation of each episode that has timed out
    """
    values = np.zeros(len(infos))
    for idx, info in enumerate(infos):
        if cut[idx]:
            last_obs = {key: obs[idx] for key, obs in new_obs.items()} if isinstance(new_obs, dict) else new_obs[idx]
        elif info.get("TimeLimit.truncated", False) and info.get("terminal_observation") is not None:
            last_obs = info["terminal_observation"]
        else:
            continue
        with th.no_grad():
            values[idx] = policy.predict_values(policy.obs_to_tensor(last_obs)[0]).item()
    return values


def reset_env(env: VecEnv, seed: int | None) -> Any:
    """``env.reset()``, after seeding if there is a seed, with errors that say where they come from."""
    try:
        if seed is not None:
            env.seed(seed)
        return env.reset()
    except Exception as error:
        raise environment_error(env, error, "in reset()") from error


def step_env(env: VecEnv, actions: np.ndarray, episodes: EpisodeTracker, episode_env: EpisodeVecEnv | None) -> Any:
    """``env.step(actions)``, with errors that say where they come from, and a check of everything that is returned."""
    try:
        if episode_env is not None:
            episode_env.active = None if episodes.n_active == env.num_envs else episodes.active
        new_obs, rewards, dones, infos = env.step(actions)
    except Exception as error:
        raise environment_error(env, error, "in step()", episodes) from error
    finally:
        if episode_env is not None:
            episode_env.active = None
    # Some VecEnv return float64, others float32: learning must not depend on which it is
    rewards = np.asarray(rewards, dtype=np.float32)
    # Hardly ever is there anything to say, and a handful of rewards is summed fastest as a list
    if not math.isfinite(sum(rewards.tolist())):
        check_finite("reward", rewards, episodes)
    if isinstance(new_obs, dict) or not all_finite(new_obs):  # type: ignore[arg-type]
        check_finite("observation", new_obs, episodes)
    if any_true(dones):
        for idx in np.flatnonzero(dones & episodes.active):
            check_finite("terminal observation", infos[idx].get("terminal_observation"), episodes, idx)
    return new_obs, rewards, dones, infos


def check_finite(name: str, values: Any, episodes: EpisodeTracker, env_idx: Any = None) -> None:
    """
    Check that what environments have returned is finite.

    :param name: what it is
    :param values: (n_envs, ...), or of the environment env_idx alone, or a dictionary of these
    :param episodes: says which environments are active, and where in which episode
    :param env_idx: the environment that the values are of, None for all
    :raises ValueError: if a value is NaN or infinite
    """
    if isinstance(values, dict):
        for key, array in values.items():
            check_finite(f"{name} under {key!r}", array, episodes, env_idx)
        return
    if not isinstance(values, np.ndarray):
        # A terminal observation is what the environment returned, which may be a number, a list, or nothing at all
        values = np.zeros(()) if values is None else np.asarray(values)
    if not all_finite(values):
        for idx, value in enumerate(values) if env_idx is None else [(env_idx, values)]:
            if not np.isfinite(value).all():
                raise ValueError(
                    f"Environment {idx} returned the {name} {np.asarray(value).tolist()} {where(episodes, idx)}. It must be "
                    "finite: nothing was learned from this rollout, and the environment has to be mended, or wrapped in "
                    "something that replaces such values"
                )


def where(episodes: EpisodeTracker, env_idx: int) -> str:
    """The place of an environment's current step, in words; the step that is being taken counts."""
    return (
        f"at step {episodes.n_steps - episodes.began[env_idx] + 1} of its episode {episodes.episodes[env_idx]} in this rollout"
    )


def environment_error(env: VecEnv, error: Exception, doing: str, episodes: EpisodeTracker | None = None) -> RuntimeError:
    """
    Say which environment raised, and where in its episode it was.

    :param env: the environments
    :param error: what was raised
    :param doing: what they were doing, in words
    :param episodes: says at which step of which episode they were; None if they were in none
    :return: the error to raise from it
    """
    idx = _index_of_culprit(env, error)
    who = f"Environment {idx}" if idx is not None else f"One of the {env.num_envs} environments"
    place = f" {where(episodes, idx)}" if episodes is not None and idx is not None else ""
    return RuntimeError(f"{who} raised {type(error).__name__} {doing}{place}: {error}")


def raised_within(env: VecEnv, error: Exception) -> bool:
    """Whether an error was raised by a method of the environments, or by something that it called."""
    return any(frame.f_locals.get("self") is env for frame, _ in traceback.walk_tb(error.__traceback__))


def _index_of_culprit(env: VecEnv, error: Exception) -> int | None:
    """The index of the environment that raised, as far as one can tell from outside of the ``VecEnv``."""
    if env.num_envs == 1:
        return 0
    # SubprocVecEnv: the process of the environment has died
    for idx, process in enumerate(getattr(env.unwrapped, "processes", [])):
        process.join(timeout=0.1)
        if not process.is_alive():
            return idx
    # DummyVecEnv: it loops over its environments
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_locals.get("self") is env.unwrapped and "env_idx" in frame.f_locals:
            return int(frame.f_locals["env_idx"])
    return None


def record_cut(model: OnPolicyAlgorithm, env: VecEnv, infos: list[dict[str, Any]], cut: np.ndarray) -> None:
    """
    Count episodes that were cut in the statistics, as ``Monitor`` counts those that end by themselves: a mean over the others
    alone would leave out what a policy does that never comes to an end.

    :param model: keeps the statistics
    :param env: the environments; without a ``Monitor`` of their own (a ``VecMonitor``, for instance) they are left out
    :param infos: what the environments returned with this step
    :param cut: indices of the environments whose episode was cut in this step
    """
    for idx in cut.tolist():
        if env.env_is_wrapped(Monitor, idx)[0]:
            (rewards,), (t_start,) = env.get_attr("rewards", idx), env.get_attr("t_start", idx)
            episode = {"r": sum(rewards), "l": len(rewards), "t": time.time() - t_start}
            model._update_info_buffer([{**infos[idx], "episode": episode}], np.ones(1, dtype=bool))


def has_time_limit(env: Any) -> bool:
    """Whether one of an environment's wrappers is a ``TimeLimit``, be it RL Zoo's, which takes the place of Gymnasium's."""
    while isinstance(env, gym.Wrapper):
        if "_max_episode_steps" in vars(env):
            return True
        env = env.env
    return False


def warn_about_cut(model: OnPolicyAlgorithm, env: VecEnv, max_episode_steps: int, cut: np.ndarray) -> None:
    """Warn that an episode was cut, once for each model, unless the environment is known to have a time limit of its own."""
    if getattr(model, "_warned_about_cut", False):
        return
    # Asking members in other processes for what they cannot send would end those
    members = getattr(env.unwrapped, "envs", None)
    endless = [idx for idx in cut.tolist() if members is None or not has_time_limit(members[idx])]
    if not endless:
        return
    model._warned_about_cut = True  # type: ignore[attr-defined]
    name = f"environment {endless[0]}"
    if members is not None:
        member = members[endless[0]].unwrapped
        name = member.spec.id if member.spec is not None else type(member).__name__
    warnings.warn(
        f"An episode of {name} was cut after max_episode_steps={max_episode_steps} steps and counts as timed out. "
        "REINFORCE learns from whole episodes: give the environment a time limit (`max_episode_steps` of gymnasium.make, or "
        "gymnasium.wrappers.TimeLimit), or raise max_episode_steps if its episodes are meant to be longer",
        stacklevel=2,
    )
