"""The base class of algorithms that learn from whole episodes: collect, learn, undo, save, load, resume."""

import io
import math
import pathlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from copy import copy
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule, TensorDict
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_reinforce.episodes.buffer import EpisodeRolloutBuffer
from sb3_reinforce.episodes.checks import check_policy_class, check_scheduled, check_spaces
from sb3_reinforce.episodes.files import FILE_FORMAT, read_model_file
from sb3_reinforce.episodes.rollout import collect_episodes
from sb3_reinforce.episodes.schedule import EpisodeSchedule
from sb3_reinforce.episodes.source import environment_error, seed_next_episodes, seeds_episodes, skips_idle_envs
from sb3_reinforce.episodes.vec_env import EnvSource, EpisodeRunner, wrap_env
from sb3_reinforce.episodes.workers import Workers, attach_workers, collect_from_workers

SelfEpisodicAlgorithm = TypeVar("SelfEpisodicAlgorithm", bound="EpisodicAlgorithm")


def clone(state: Any) -> Any:
    """A copy of nested dictionaries and lists of tensors, in a tenth of the time of a deep copy."""
    if isinstance(state, dict):
        return {key: clone(value) for key, value in state.items()}
    if isinstance(state, list):
        return [clone(value) for value in state]
    return state.clone() if isinstance(state, th.Tensor) else state


class StepsProgressBar(ProgressBarCallback):
    """SB3's progress bar, moved by the steps that were taken: not every member of an ``EpisodeVecEnv`` takes each one."""

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._n_shown: int = self.model.num_timesteps

    def _on_step(self) -> bool:
        self.pbar.update(self.num_timesteps - self._n_shown)
        self._n_shown = self.num_timesteps
        return True


def release_signals(callback: Any) -> None:
    """Let callbacks that handle signals give them back, wherever among callbacks they are."""
    if hasattr(callback, "release_signals"):
        callback.release_signals()
    for inner in [*getattr(callback, "callbacks", []), getattr(callback, "callback", None)]:
        if isinstance(inner, BaseCallback):
            release_signals(inner)


class EpisodicAlgorithm(OnPolicyAlgorithm):
    """
    The base of algorithms that learn from batches of whole episodes.

    Episodes are numbered over the life of a model. With a seed, the environment's seed and the noise of the actions of an
    episode depend on the seed and its number alone. Parameters that are not below are SB3's.

    :param policy: The policy model to use
    :param env: see ``REINFORCE``, as the parameters that follow
    """

    rollout_buffer: EpisodeRolloutBuffer
    #: Arguments that load() cannot change, because the policy holds what was fitted with them
    _fixed_arguments: tuple[str, ...] = ()

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: EnvSource | None,
        learning_rate: float | Schedule,
        n_steps: int | None,
        n_episodes: int | None,
        max_episode_steps: int | None = None,
        bootstrap_timeouts: bool = True,
        workers: int | Executor | None = None,
        episode_timeout: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            policy,
            None,  # type: ignore[arg-type]  # see _attach_env
            learning_rate=learning_rate,
            n_steps=n_steps,  # type: ignore[arg-type]
            gae_lambda=1.0,
            vf_coef=0.0,
            max_grad_norm=math.inf,
            _init_setup_model=False,
            **kwargs,
        )
        check_policy_class(self.policy_class)
        self.n_episodes = n_episodes
        self.max_episode_steps = max_episode_steps
        self.bootstrap_timeouts = bootstrap_timeouts
        self.workers = workers
        self.episode_timeout = episode_timeout
        # Number of the first episode of the next batch
        self._next_episode = 0
        # Updates since num_timesteps was 0
        self._n_iterations = 0
        #: Seed of all that is random in a run but the environments: ``seed``, or one that is drawn
        self.run_seed: Any = self.seed
        # What a file gets while a rollout or its update is on; what had been logged then, and not been written
        self._rollout_start: dict[str, Any] | None = None
        self._logged: dict[str, Any] = {}
        self._has_told = False
        self._running_workers: Workers | None = None
        # By the clock, None before the first rollout of a call of learn()
        self._rollout_end: float | None = None
        if env is not None:
            self._attach_env(env, policy)

    def _attach_env(self, env: EnvSource, policy: str | type[BasePolicy]) -> None:
        """Wrap and check the environment. SB3's own way refuses actions without bounds, which a Gaussian does not need."""
        self.env = wrap_env(env, self.max_episode_steps, self.verbose)
        self.observation_space = self.env.observation_space
        self.action_space = self.env.action_space
        self.n_envs = self.env.num_envs
        self._vec_normalize_env = unwrap_vec_normalize(self.env)
        check_spaces(self, policy)
        attach_workers(self.workers, self.env)

    def set_env(self, env: EnvSource, force_reset: bool = True) -> None:
        """Learn from another environment, see SB3. In a callback, the rollout that is running ends in the one it began in."""
        env = wrap_env(env, self.max_episode_steps, self.verbose)
        attach_workers(self.workers, env)
        super().set_env(env, force_reset)

    def _setup_model(self) -> None:
        if self.env is None and self.observation_space is None:
            raise ValueError("env=None has no spaces to make a policy for: give an environment, or _init_setup_model=False")
        self._setup_lr_schedule()
        check_scheduled("learning_rate", self.lr_schedule(1.0), 1.0)
        if self.run_seed is None:
            self.run_seed = int(np.random.randint(2**31))
        self.set_random_seed(self.seed)
        self.file_format = FILE_FORMAT
        self.rollout_buffer_class = self.rollout_buffer_class or EpisodeRolloutBuffer
        self.rollout_buffer = self.rollout_buffer_class(  # type: ignore[assignment]
            self.n_steps or 1024,
            self.observation_space,
            self.action_space,
            device=self.device,
            gamma=self.gamma,
            n_envs=self.n_envs,
            **self.rollout_buffer_kwargs,
        )
        # A seed that was drawn makes the same weights as one that is given, and leaves PyTorch's generator as it was
        with th.random.fork_rng(devices=[], enabled=self.seed is None):
            th.default_generator.manual_seed(self.run_seed)
            self.policy = self._make_policy().to(self.device)
        self._maybe_recommend_cpu("MlpPolicy")

    def _make_policy(self) -> ActorCriticPolicy:
        raise NotImplementedError()

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed the generators of Python, NumPy, PyTorch, the action space and the environments, and the episodes to come."""
        super().set_random_seed(seed)
        if seed is not None:
            self.seed = self.run_seed = seed

    def _next_schedule(self, n_rollout_steps: int | None) -> EpisodeSchedule:
        min_transitions = (n_rollout_steps or 0) * self.n_envs
        assert self.env is not None
        seed = self.seed if seeds_episodes(self.env) else None
        return EpisodeSchedule(self.n_envs, min_transitions, self.n_episodes or 0, self._next_episode, seed)

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: EpisodeRolloutBuffer,  # type: ignore[override]
        n_rollout_steps: int | None,
    ) -> bool:
        """
        Collect whole episodes with the current policy, and compute their returns and advantages.

        :param env: The training environment
        :param callback: Callback that will be called at each step (and at the beginning and end of the rollout)
        :param rollout_buffer: Buffer to fill with episodes
        :param n_rollout_steps: Number of transitions to collect per environment, None to collect ``n_episodes`` episodes
        :return: False if the callback ended the rollout before its time
        """
        self._num_timesteps_before_rollout = self.num_timesteps
        self._rollout_start = dict(self._resume_point(), _last_obs=None)
        self.logger.record("rollout/seed", self.run_seed, exclude="tensorboard")
        if self._rollout_end is not None:
            self.logger.record("time/between_rollouts", perf_counter() - self._rollout_end)
        schedule = self._next_schedule(n_rollout_steps)
        if self.workers is None:
            is_complete = collect_episodes(self, callback, rollout_buffer, schedule, self.run_seed, self.bootstrap_timeouts)
        else:
            self._running_workers = self._running_workers or Workers(self.workers)
            is_complete = collect_from_workers(
                self, callback, rollout_buffer, schedule, self._running_workers, self.bootstrap_timeouts
            )
        self._rollout_end = perf_counter()
        if not is_complete:
            return False
        self._compute_advantages()
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _compute_advantages(self) -> None:
        """Compute returns and advantages of the batch in the rollout buffer."""
        raise NotImplementedError()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """An update, after which policy, optimizer and counters are as after it or, whatever interrupts it, as before it."""
        names = ("_n_updates", "_next_episode", "_n_iterations", "_rollout_start")
        before = clone(self.get_parameters()), {name: getattr(self, name) for name in names}
        try:
            yield
            # At once: a file has either all or nothing of the update
            n_episodes = int(self.rollout_buffer.episode_starts.sum())
            after = (self._n_updates + 1, self._next_episode + n_episodes, self._n_iterations + 1, None)
            self.__dict__.update(zip(names, after, strict=True))
        except BaseException:
            super().set_parameters(before[0])
            self.__dict__.update(before[1])
            self.policy.set_training_mode(False)
            raise

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # Were the steps of the latest batch counted, as they are by SB3, a schedule would be past its beginning for the first
        # update, and at its end for the last one, which with whole episodes may be the only one
        super()._update_current_progress_remaining(self._num_timesteps_before_rollout, total_timesteps)

    def _tell_limits(self) -> None:
        """Say once if a run cannot be repeated, or be resumed exactly."""
        reasons = []
        if self.seed is None:
            reasons.append(f"there is no seed for environments (weights and actions are those of seed={self.run_seed})")
        assert self.env is not None
        if not seeds_episodes(self.env):
            reasons.append(f"a {type(self.env.unwrapped).__name__} does not seed each episode")
        elif self.n_envs > 1 and not skips_idle_envs(self.env):
            reasons.append(f"a {type(self.env).__name__} steps idle environments along")
        if reasons and self.verbose >= 1 and not self._has_told:
            print(f"Another run, or one resumed from a file, will not be the same to the last bit: {', and '.join(reasons)}")
        self._has_told = True

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        if self.env is None:
            raise ValueError("The model has no environment to learn from: give one to load() or set_env()")
        attach_workers(self.workers, self.env)
        if reset_num_timesteps:
            self._last_obs = self._rollout_start = None
            self._n_iterations = 0
        is_reset, episode_env = self._last_obs is None, self.env.unwrapped
        if is_reset:
            seed_next_episodes(self.env, self._next_schedule(None))
        try:
            result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)
        except Exception as error:
            if self._last_obs is None:
                raise environment_error(self.env, error, "in reset()") from error
            raise
        if not reset_num_timesteps:
            for name, (value, count, excluded) in self._logged.items():
                # Files have lists for tuples
                self.logger.record(name, value, tuple(excluded or ()))
                self.logger.name_to_count[name] = count
        self._logged = {}
        self._tell_limits()
        if isinstance(episode_env, EpisodeRunner):
            if is_reset:
                episode_env.owner = self
        elif not is_reset:
            # Others, an evaluation for instance, may have stepped the environments since the last rollout
            self._last_episode_starts = np.zeros(self.n_envs, dtype=bool)
        return result

    def learn(
        self: SelfEpisodicAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "EpisodicAlgorithm",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfEpisodicAlgorithm:
        if progress_bar:
            given = callback if isinstance(callback, list) else [callback]
            callback = [StepsProgressBar(), *(c if isinstance(c, BaseCallback) else ConvertCallback(c) for c in given if c)]
        total_timesteps, callback = self._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name)
        # SB3 counts within each call: what is logged when would depend on how a run is divided into calls
        iteration = self._n_iterations
        try:
            callback.on_training_start(locals(), globals())
            assert self.env is not None
            while self.num_timesteps < total_timesteps:
                if not self.collect_rollouts(self.env, callback, self.rollout_buffer, n_rollout_steps=self.n_steps):
                    break
                self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                iteration = self._n_iterations + 1
                if log_interval is not None and iteration % log_interval == 0:
                    self.dump_logs(iteration)
                self.train()
        except BaseException:
            # Callbacks do not hear of it
            release_signals(callback)
            raise
        finally:
            if self._running_workers is not None:
                self._running_workers.close()
                self._running_workers = None
            self._rollout_end = None
            self._logged = self._resume_point()["_logged"]
        callback.on_training_end()
        return self

    def _resume_point(self) -> dict[str, Any]:
        """What changes within a rollout and is saved, as it is now."""
        logged = {}
        if (logger := getattr(self, "_logger", None)) is not None:
            for name, value in logger.name_to_value.items():
                if isinstance(value, np.ScalarType) and not name.startswith("time/"):
                    logged[name] = value, logger.name_to_count.get(name, 0), logger.name_to_excluded.get(name)
        return dict(
            num_timesteps=self.num_timesteps,
            ep_info_buffer=copy(self.ep_info_buffer),
            ep_success_buffer=copy(self.ep_success_buffer),
            _logged=logged,
        )

    def _excluded_save_params(self) -> list[str]:
        # The checkpoint callback includes the state of the logs
        own = ["_rollout_start", "_rollout_end", "_has_told", "_log_state", "workers", "_running_workers"]
        return [*super()._excluded_save_params(), *own]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save all attributes and parameters in a zip-file, see SB3.

        A rollout that is running, or was stopped, is not part of it, and its steps do not count as taken: loaded, the model
        collects the same episodes again.
        """
        now = self.__dict__.copy()
        point = self._rollout_start or self._resume_point()
        self.__dict__.update(point)
        try:
            super().save(path, exclude, include)
        finally:
            self.__dict__.update({name: now[name] for name in point})

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters (of policy, baseline, observation statistics and optimizer) from a zip-file or a nested dictionary, see
        SB3. If they do not fit, nothing is changed. Nothing in the file is executed: PyTorch reads weights only.
        """
        before = clone(self.get_parameters())
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
        except Exception:
            super().set_parameters(before)
            raise

    @classmethod
    def load(
        cls: type[SelfEpisodicAlgorithm],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: EnvSource | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> SelfEpisodicAlgorithm:
        """
        Load the model from a zip-file, see SB3's ``BaseAlgorithm.load``.

        ``load(path, env).learn(rest, reset_num_timesteps=False)`` continues a seeded run as if it had not been stopped: to the
        last bit, on the same machine, on an :class:`~sb3_reinforce.EpisodeVecEnv` that no wrapper steps along, with an
        environment whose ``reset(seed=...)`` leaves nothing of earlier episodes. Other ``VecEnv`` are not seeded by episode:
        there, training goes on with other episodes, as it does without a seed.

        Loading a file can execute code that is hidden in it: its attributes are pickled. Of a file from someone else, load the
        weights alone into a new model, by :meth:`set_parameters`.

        :param path: path to the file (or a file-like) where to load the agent from
        :param env: The environment to learn from, as in the constructor; None if the model is to predict only
        :return: new model instance with loaded parameters
        :raises ValueError: if the file is damaged or holds a model of another algorithm, if the spaces of the environment
            are not those of the model, or if an argument asks for a baseline that is not the model's
        """
        changes = {**(kwargs.get("custom_objects") or {}), **kwargs}
        content, saved = read_model_file(path, changes, cls._fixed_arguments)
        if env is not None:
            env = wrap_env(env, changes.get("max_episode_steps", saved.get("max_episode_steps")), saved.get("verbose", 0))
            attach_workers(changes.get("workers"), env)
        return super().load(content, env, *args, **kwargs)
