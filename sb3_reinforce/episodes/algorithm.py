"""Base class of algorithms that learn from whole episodes: collect, learn, undo, save, load, resume."""

import io
import math
import operator
import pathlib
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from copy import copy, deepcopy
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_reinforce.episodes.buffer import EpisodeRolloutBuffer
from sb3_reinforce.episodes.checks import FILE_FORMAT, check_policy_class, check_scheduled, check_spaces, read_model_file
from sb3_reinforce.episodes.rollout import StepsProgressBar, all_callbacks, collect_episodes
from sb3_reinforce.episodes.schedule import TORCH_LOCK, EpisodeSchedule
from sb3_reinforce.episodes.source import add_environment_note, reasons_not_reproducible, seed_next_episodes
from sb3_reinforce.episodes.vec_env import EnvSource, EpisodeRunner, wrap_env
from sb3_reinforce.episodes.workers import Workers, check_workers, collect_from_workers

SelfEpisodicAlgorithm = TypeVar("SelfEpisodicAlgorithm", bound="EpisodicAlgorithm")
_logged_values = operator.attrgetter("name_to_value", "name_to_count", "name_to_excluded")  # of a logger


class EpisodicAlgorithm(OnPolicyAlgorithm):
    """
    Base class of algorithms that learn from batches of whole episodes, which are numbered over the life of a model. See
    ``REINFORCE`` for the parameters. A subclass implements ``_make_policy``, ``_compute_advantages`` and ``train``.
    """

    rollout_buffer: EpisodeRolloutBuffer
    #: Arguments that load() cannot replace, because the policy is fitted with them, and attributes that train() replaces
    _fixed_arguments: tuple[str, ...] = ()
    _update_state: tuple[str, ...] = ()

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: EnvSource | None,
        learning_rate: float | Schedule,
        n_steps: int | None,
        n_episodes: int | None,
        max_episode_steps: int | None = None,
        bootstrap_timeouts: bool = False,
        seed_episodes: bool = True,
        workers: int | Executor | None = None,
        **kwargs: Any,
    ):
        # SB3 would refuse actions without bounds, which a Gaussian does not need
        kwargs |= dict(learning_rate=learning_rate, n_steps=n_steps, _init_setup_model=False)
        super().__init__(policy, None, gae_lambda=1.0, vf_coef=0.0, max_grad_norm=math.inf, **kwargs)  # type: ignore[arg-type]
        check_policy_class(self.policy_class)
        self.n_episodes, self.max_episode_steps = n_episodes, max_episode_steps
        self.bootstrap_timeouts, self.seed_episodes, self.workers = bootstrap_timeouts, seed_episodes, workers
        self.file_format = FILE_FORMAT
        #: Identity of the run: its checkpoints carry it, and a model that begins anew gets another one
        self.run_id = uuid.uuid4().hex[:8]
        # Number of the next batch's first episode, and updates since num_timesteps was 0
        self._next_episode = self._n_iterations = 0
        #: Seed of everything random except the environments: ``seed``, or a drawn one
        self.run_seed: Any = self.seed
        # State at the start of the unfinished iteration, which files contain
        self._rollout_start: dict[str, Any] | None = None
        self._logged: list[dict[str, Any]] = []
        self._has_warned = False
        self._running_workers: Workers | None = None
        self._rollout_end: float | None = None
        if env is not None:
            self.env = wrap_env(env, max_episode_steps, self.verbose)
            self.observation_space, self.action_space = self.env.observation_space, self.env.action_space
            self.n_envs = self.env.num_envs
            self._vec_normalize_env = unwrap_vec_normalize(self.env)
            check_spaces(self, policy)
            check_workers(workers, self.env)

    def set_env(self, env: EnvSource, force_reset: bool = True) -> None:
        """Set the environment, see SB3. In a callback, it is used from the next rollout on."""
        super().set_env(wrap_env(env, self.max_episode_steps, self.verbose), force_reset)

    def _setup_model(self) -> None:
        if getattr(self, "observation_space", None) is None:
            raise ValueError("env=None has no spaces to make a policy for: give an environment, or _init_setup_model=False")
        self._setup_lr_schedule()
        check_scheduled("learning_rate", self.lr_schedule(1.0), 1.0)
        if self.run_seed is None:
            self.run_seed = int(np.random.randint(2**31))
        self.set_random_seed(self.seed)
        self.rollout_buffer_class = self.rollout_buffer_class or EpisodeRolloutBuffer
        spaces = (self.observation_space, self.action_space)
        kwargs = dict(device=self.device, gamma=self.gamma, n_envs=self.n_envs, **self.rollout_buffer_kwargs)
        self.rollout_buffer = self.rollout_buffer_class(self.n_steps or 0, *spaces, **kwargs)  # type: ignore[assignment]
        # A drawn seed makes the same weights as a given one, and leaves PyTorch's generator alone
        with TORCH_LOCK, th.random.fork_rng(devices=[], enabled=self.seed is None):
            th.default_generator.manual_seed(self.run_seed)
            self.policy = self._make_policy().to(self.device)
        self._maybe_recommend_cpu("MlpPolicy")

    def _make_policy(self) -> ActorCriticPolicy:
        raise NotImplementedError()

    def _compute_advantages(self) -> None:
        raise NotImplementedError()

    def set_random_seed(self, seed: int | None = None) -> None:
        """Set the seed of the pseudo-random generators (Python, NumPy, PyTorch, action space) and of the next episodes."""
        # Python refuses NumPy's integers
        super().set_random_seed(seed := None if seed is None else operator.index(seed))
        if seed is not None:
            self.seed = self.run_seed = seed

    def _next_schedule(self, n_rollout_steps: int | None) -> EpisodeSchedule:
        is_seeded = self.seed_episodes and self.env is not None and getattr(self.env.unwrapped, "seeds_episodes", False)
        seed, minimums = self.seed if is_seeded else None, ((n_rollout_steps or 0) * self.n_envs, self.n_episodes or 0)
        return EpisodeSchedule(self.n_envs, *minimums, self._next_episode, seed)

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: EpisodeRolloutBuffer,  # type: ignore[override]
        n_rollout_steps: int | None,
    ) -> bool:
        """Collect whole episodes using the current policy, and compute their returns and advantages, see SB3."""
        self._num_timesteps_before_rollout = self.num_timesteps
        self._rollout_start = dict(self._resume_point(), _last_obs=None)
        self.logger.record("rollout/seed", self.run_seed, exclude="tensorboard")
        if self._rollout_end is not None:
            self.logger.record("time/between_rollouts", perf_counter() - self._rollout_end)
        schedule = self._next_schedule(n_rollout_steps)
        if self.workers is None:
            is_complete = collect_episodes(self, callback, rollout_buffer, n_rollout_steps, schedule)
        else:
            workers = self._running_workers = self._running_workers or Workers(self.workers)
            is_complete = collect_from_workers(self, callback, rollout_buffer, n_rollout_steps, schedule, workers)
        self._rollout_end = perf_counter()
        if is_complete:
            self._compute_advantages()
            callback.update_locals(locals())
            callback.on_rollout_end()
        return is_complete

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Count an update, or restore parameters and counters if an error or Ctrl-C interrupts it."""
        counters = ("_n_updates", "_next_episode", "_n_iterations", "_rollout_start")
        parameters, before = deepcopy(self.get_parameters()), {key: vars(self)[key] for key in counters + self._update_state}
        try:
            yield
            n_episodes = int(self.rollout_buffer.episode_starts.sum())
            after = (self._n_updates + 1, self._next_episode + n_episodes, self._n_iterations + 1, None)
            # Set together so that a checkpoint never contains half an update
            self.__dict__.update(zip(counters, after, strict=True))
        except BaseException:
            self.set_parameters(parameters)  # type: ignore[arg-type]
            self.__dict__.update(before)
            self.policy.set_training_mode(False)
            raise

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # At the start of the rollout: SB3 includes the current batch, so a schedule would never see 1.0
        super()._update_current_progress_remaining(self._num_timesteps_before_rollout, total_timesteps)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        callback = super()._init_callback(callback, progress_bar)
        for inner in all_callbacks(callback):
            if type(inner) is ProgressBarCallback:
                inner.__class__ = StepsProgressBar
        return callback

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, reset_num_timesteps: bool = True, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        if self.env is None:
            raise ValueError("The model has no environment to learn from: give one to load() or set_env()")
        check_workers(self.workers, self.env)
        if reset_num_timesteps:
            self.run_id = uuid.uuid4().hex[:8] if self.num_timesteps else self.run_id
            self._last_obs = self._rollout_start = None
            self._n_iterations = 0
        is_reset = self._last_obs is None
        if is_reset:
            seed_next_episodes(self.env, self._next_schedule(None))
        try:
            result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)
        except Exception as error:
            if self._last_obs is None:
                add_environment_note(error, self.env, "in reset()")
            raise
        if not reset_num_timesteps:
            for current, saved in zip(_logged_values(self.logger), self._logged, strict=False):
                current.update(saved)
        reasons = reasons_not_reproducible(self.env)
        if self.seed is None:
            reasons.append(f"there is no seed for environments (weights and actions use seed={self.run_seed})")
        elif not self.seed_episodes:
            reasons.append("seed_episodes=False seeds the first reset alone")
        if reasons and self.verbose >= 1 and not self._has_warned:
            print(f"This run is not exactly reproducible: {', and '.join(reasons)}")
        self._has_warned = True
        if isinstance(self.env.unwrapped, EpisodeRunner):
            if is_reset:
                self.env.unwrapped.user = self
        elif not is_reset:
            self._last_episode_starts = np.zeros(self.n_envs, dtype=bool)
        return result

    def learn(
        self: SelfEpisodicAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfEpisodicAlgorithm:
        """Return a trained model, see SB3. The last batch is finished: it can end after ``total_timesteps``."""
        tb_log_name, reset = tb_log_name or type(self).__name__, reset_num_timesteps
        total_timesteps, callback = self._setup_learn(total_timesteps, callback, reset, tb_log_name, progress_bar)
        iteration = self._n_iterations
        try:
            callback.on_training_start(locals(), globals())
            while self.num_timesteps < total_timesteps:
                if not self.collect_rollouts(self.env, callback, self.rollout_buffer, n_rollout_steps=self.n_steps):  # type: ignore[arg-type]
                    break
                self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
                iteration = self._n_iterations + 1
                if log_interval is not None and iteration % log_interval == 0:
                    self.dump_logs(iteration)
                self.train()
            callback.on_training_end()
        except BaseException:
            self._last_obs = None
            raise
        finally:
            self._rollout_end, self._logged = None, self._resume_point()["_logged"]
            workers, self._running_workers = self._running_workers, None
            try:
                # SB3 does not call on_training_end() after an exception. An open progress bar would break printed lines
                for inner in sorted(all_callbacks(callback), key=lambda inner: not isinstance(inner, ProgressBarCallback)):
                    getattr(inner, "on_learn_end", lambda: None)()
            finally:
                if workers is not None:
                    workers.close()
        return self

    def _resume_point(self) -> dict[str, Any]:
        """Attributes that change during a rollout and are saved."""
        names = ("num_timesteps", "ep_info_buffer", "ep_success_buffer")
        logged: list[dict[str, Any]] = []
        if hasattr(self, "_logger"):
            kept = [name for name, value in [*self.logger.name_to_value.items()] if np.isscalar(value) and name[:5] != "time/"]
            logged = [{name: values[name] for name in kept if name in values} for values in _logged_values(self.logger)]
        return {name: copy(getattr(self, name)) for name in names} | {"_logged": logged}

    def _excluded_save_params(self) -> list[str]:
        own = ["_rollout_start", "_rollout_end", "_has_warned", "_log_state", "workers", "_running_workers"]
        return super()._excluded_save_params() + own

    def save(self, path: Any, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """Save the model in a zip-file, see SB3, without an unfinished rollout: the loaded model collects it again."""
        # A copy, because another thread may be learning
        saved = copy(self)
        saved.__dict__.update(saved._rollout_start or saved._resume_point())
        super(EpisodicAlgorithm, saved).save(path, exclude, include)

    @classmethod
    def load(
        cls: type[SelfEpisodicAlgorithm],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: EnvSource | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfEpisodicAlgorithm:
        """
        Load the model from a zip-file, see SB3. ``load(path, env).learn(rest, reset_num_timesteps=False)`` continues a seeded
        run exactly, on the same machine, if ``reset(seed=...)`` of the environment leaves nothing of earlier episodes.

        :raises ValueError: if the file is damaged, or does not fit the algorithm, the environment or an argument
        """
        changes = {**(custom_objects or {}), **kwargs}
        content, saved = read_model_file(path, changes, cls._fixed_arguments)
        if env is not None:
            env = wrap_env(env, changes.get("max_episode_steps", saved.get("max_episode_steps")), saved.get("verbose", 0))
        return super().load(content, env, device, custom_objects, print_system_info, force_reset, **kwargs)
