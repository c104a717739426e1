"""A batch of whole episodes from the environments of this process, and its callbacks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback, ProgressBarCallback

from sb3_reinforce.episodes.acting import EpisodeNoise, make_actor
from sb3_reinforce.episodes.buffer import EpisodeRolloutBuffer, copy_obs
from sb3_reinforce.episodes.schedule import EpisodeSchedule
from sb3_reinforce.episodes.source import EpisodeSource, not_finite


def collect_episodes(
    model: Any,
    callback: BaseCallback,
    rollout_buffer: EpisodeRolloutBuffer,
    n_rollout_steps: int | None,
    schedule: EpisodeSchedule,
) -> bool:
    """Fill a buffer with episodes, see ``collect_rollouts``. Steps of idle sub-environments only add to ``num_timesteps``."""
    model.policy.set_training_mode(False)
    rollout_buffer.reset()
    callback.on_rollout_start()
    # The callback may have set another one
    env = model.env
    source = EpisodeSource(env, schedule, model)
    obs = model._last_obs = source.begin(model._last_obs, np.asarray(model._last_episode_starts, dtype=bool))
    # Mark all environments as mid-episode until the rollout completes
    model._last_episode_starts = np.zeros(env.num_envs, dtype=bool)

    noise = EpisodeNoise(env.num_envs, model.run_seed, model.sde_sample_freq)
    noise.begin(range(env.num_envs), schedule.numbers)
    act = make_actor(model.policy, noise)
    within_episode = np.zeros(env.num_envs, dtype=bool)
    episode_starts, is_observed = schedule.active, observes_steps(callback)
    while schedule.n_active or schedule.wants_more():
        actions, clipped_actions = source.act(act, obs)
        active, n_active = schedule.active, schedule.n_active
        n_before: Any = schedule.n_steps - schedule.start_steps if model.bootstrap_timeouts else 0
        kept_obs = copy_obs(obs)  # a VecEnv may use their memory again
        new_obs, rewards, dones, infos = source.step(clipped_actions)
        model.num_timesteps += n_active if source.skips_idle_envs else env.num_envs
        if is_observed:
            n_steps = schedule.n_steps
            callback.update_locals(locals())
        continue_training = not is_observed or callback.on_step()
        if model.env is env:  # another one, set by the callback, begins with a reset
            model._last_obs = new_obs
        if not continue_training:
            return False
        if len(ended := dones.nonzero()[0]):
            model._update_info_buffer([infos[env_idx] for env_idx in ended], dones[ended])
            if model.bootstrap_timeouts:
                rewards = rewards + model.gamma * timeout_values(model.policy, infos, n_before + 1)
        if n_active:
            rollout_buffer.add(kept_obs, actions, rewards, episode_starts, active)
        episode_starts = within_episode
        if schedule.started:
            noise.begin(schedule.started, schedule.numbers)
            episode_starts = within_episode.copy()
            episode_starts[schedule.started] = True
        obs = new_obs

    model._last_episode_starts = source.at_start
    finish_rollout(model, rollout_buffer, schedule)
    return True


def finish_rollout(model: Any, rollout_buffer: EpisodeRolloutBuffer, schedule: EpisodeSchedule) -> None:
    """Finish a buffer and log its size. A ValueError names the first value that is NaN or infinite."""
    if (bad := rollout_buffer.finish()) is not None:
        name, value, env_idx, position, n_before = bad
        who = "The policy" if name == "action" else f"Environment {env_idx}"
        # An observation is returned by the step before the action
        n_step = n_before + (not name.startswith("observation"))
        episode = schedule.name(schedule.next_number - schedule.n_started + position)
        raise not_finite(who, name, value, f"at step {n_step} of {episode}" if n_step else f"in reset() of {episode}")
    model.logger.record("rollout/episodes", schedule.n_started)
    model.logger.record("rollout/transitions", schedule.n_transitions)
    n_env_steps = model.num_timesteps - model._num_timesteps_before_rollout
    model.logger.record("rollout/idle_fraction", 1.0 - schedule.n_transitions / n_env_steps)


def timeout_values(policy: Any, infos: list[dict[str, Any]], n_steps: np.ndarray) -> np.ndarray:
    """(n_envs,) values of the last observations of episodes that a time limit ended after n_steps, else 0 (SB3 issue 633)."""
    values = np.zeros(len(infos))
    for idx, info in enumerate(infos):
        if info.get("TimeLimit.truncated", False) and info.get("terminal_observation") is not None:
            with th.no_grad():
                obs, _ = policy.obs_to_tensor(info["terminal_observation"])
                values[idx] = policy.predict_values(obs, th.as_tensor(n_steps[[idx]], device=policy.device)).item()
    return values


class StepsProgressBar(ProgressBarCallback):
    """SB3's progress bar, moved by ``num_timesteps`` to its total, with the latest mean return, and always closed."""

    def _on_training_start(self) -> None:
        from rich.progress import BarColumn, TimeRemainingColumn
        from tqdm.rich import FractionColumn, tqdm

        columns = ("{task.description}{task.percentage:4.0f}%", BarColumn(20), FractionColumn(), TimeRemainingColumn(), "left")
        self.pbar = tqdm(total=self.locals["total_timesteps"] - self.model.num_timesteps, progress=columns)

    def _on_step(self) -> bool:
        self.pbar.update(min(self.num_timesteps - self.model._num_timesteps_at_start, self.pbar.total) - self.pbar.n)
        return True

    def _on_rollout_end(self) -> None:
        if self.model.ep_info_buffer:
            self.pbar.set_description(f"return {np.mean([info['r'] for info in self.model.ep_info_buffer]):.1f}")

    def on_learn_end(self) -> None:
        if hasattr(self, "pbar"):
            self.pbar.close()


def observes_steps(callback: BaseCallback) -> bool:
    """Whether a callback is called in each step. What SB3 makes of None would do nothing, in a twelfth of the time."""
    return type(callback) is not ConvertCallback or callback.callback is not None


def all_callbacks(callback: BaseCallback) -> Iterator[BaseCallback]:
    """Iterate over a callback and those that it calls, which come first."""
    for inner in [*getattr(callback, "callbacks", []), getattr(callback, "callback", None)]:
        if isinstance(inner, BaseCallback):
            yield from all_callbacks(inner)
    yield callback
