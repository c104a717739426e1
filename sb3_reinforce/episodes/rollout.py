"""A batch of whole episodes from the environments of this process."""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_reinforce.episodes.acting import EpisodeNoise, baseline_features, make_actor, watch_modules
from sb3_reinforce.episodes.buffer import EpisodeRolloutBuffer
from sb3_reinforce.episodes.schedule import EpisodeSchedule
from sb3_reinforce.episodes.source import EpisodeSource


def collect_episodes(
    model: OnPolicyAlgorithm,
    callback: BaseCallback,
    rollout_buffer: EpisodeRolloutBuffer,
    schedule: EpisodeSchedule,
    noise_seed: int,
    bootstrap_timeouts: bool,
) -> bool:
    """
    Fill a buffer with whole episodes, as many as a schedule wants.

    Most ``VecEnv`` cannot leave environments alone. Episodes that are not in the rollout are then run to their end unobserved:
    they count as ``num_timesteps``, but are stored nowhere, and callbacks see a reward of 0 and no end of an episode.

    :param model: the algorithm: its policy acts, its counters and statistics are kept up to date
    :param callback: called at the start of the rollout and after every step, with the local variables of this function
    :param rollout_buffer: is emptied, then filled
    :param schedule: which episodes to run
    :param noise_seed: together with the number of an episode, fixes the noise of its actions
    :param bootstrap_timeouts: whether, at a time-out, the baseline's value of the last observation stands for the rewards
        that would have followed (Pardo et al., 2018; SB3 issue 633)
    :return: False if the callback stopped the rollout; it cannot be learned from then
    :raises ValueError: when a reward, an observation or the policy's output is NaN or infinite
    :raises RuntimeError: when an environment raises, or an episode does not end
    """
    model.policy.set_training_mode(False)
    rollout_buffer.reset()
    callback.on_rollout_start()
    # The callback may have set another environment
    env = model.env
    assert env is not None
    source = EpisodeSource(env, schedule, model)
    obs = model._last_obs = source.begin(model._last_obs, np.asarray(model._last_episode_starts, dtype=bool))
    # Until the rollout is over, nobody knows where the environments are
    model._last_episode_starts = np.zeros(env.num_envs, dtype=bool)

    noise = EpisodeNoise(env.num_envs, noise_seed, model.sde_sample_freq)
    noise.begin(range(env.num_envs), schedule.numbers)
    act = make_actor(model.policy, noise)
    within = np.zeros(env.num_envs, dtype=bool)
    episode_starts = schedule.active
    # Callbacks find the steps of the rollout under the name n_steps, as in A2C
    n_steps = n_env_steps = 0
    with watch_modules() as changes:
        while schedule.n_active or schedule.wants_more():
            if changes or not act.is_current(model.policy):
                changes.clear()
                act = make_actor(model.policy, noise)
            actions, clipped_actions = act(obs)
            active, n_active = schedule.active, schedule.n_active
            new_obs, rewards, dones, infos = source.step(clipped_actions)
            n_stepped = n_active if source.skips_idle_envs else env.num_envs
            model.num_timesteps += n_stepped
            n_env_steps += n_stepped
            n_steps += 1

            callback.update_locals(locals())
            if not callback.on_step():
                if model.env is env:
                    model._last_obs = new_obs
                return False
            if len(dones.nonzero()[0]):
                model._update_info_buffer(infos, dones)
                if bootstrap_timeouts:
                    rewards = rewards + model.gamma * timeout_values(model.policy, infos, schedule)
            if n_active:
                rollout_buffer.add(obs, actions, rewards, episode_starts, active, act.values)
            episode_starts = within
            if schedule.started:
                noise.begin(schedule.started, schedule.numbers)
                episode_starts = within.copy()
                episode_starts[schedule.started] = True
            obs = new_obs
            # Not if the callback has set another environment, which then begins with a reset
            if model.env is env:
                model._last_obs = obs

    model._last_episode_starts = source.at_start
    rollout_buffer.finish()
    log_rollout(model.logger, schedule, n_env_steps)
    return True


def log_rollout(logger: Logger, schedule: EpisodeSchedule, n_env_steps: int) -> None:
    """How much a rollout has collected, and what fraction of the steps of the environments were not part of it."""
    logger.record("rollout/episodes", schedule.n_started)
    logger.record("rollout/transitions", schedule.n_transitions)
    logger.record("rollout/idle_fraction", 1.0 - schedule.n_transitions / n_env_steps)


def timeout_values(policy: ActorCriticPolicy, infos: list[dict[str, Any]], schedule: EpisodeSchedule) -> np.ndarray:
    """(n_envs,) what the baseline expects after the last observation of each episode that has timed out; 0 for the others."""
    values = np.zeros(len(infos))
    for idx, info in enumerate(infos):
        if info.get("TimeLimit.truncated", False) and info.get("terminal_observation") is not None:
            try:
                with th.no_grad():
                    obs_tensor, _ = policy.obs_to_tensor(info["terminal_observation"])
                    features = baseline_features(policy, obs_tensor)
                    values[idx] = policy.value_net.predict(features).item()  # type: ignore[operator]
            except Exception as error:
                raise ValueError(
                    f"Environment {idx} returned the terminal observation {info['terminal_observation']!r} "
                    f"{schedule.where(idx)}, which is none of its space: {error}"
                ) from error
    return values
