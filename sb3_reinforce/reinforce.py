"""The REINFORCE algorithm."""

import io
import math
import pathlib
from collections import defaultdict
from collections.abc import Generator, Iterable
from concurrent.futures import Executor
from copy import copy
from time import perf_counter
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule, TensorDict
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch.nn.attention import SDPBackend, sdpa_kernel

from sb3_reinforce.buffers import EpisodeBufferSamples, EpisodeRolloutBuffer
from sb3_reinforce.callbacks import StepsProgressBar, release_signals
from sb3_reinforce.checks import (
    FILE_FORMAT,
    check_hyperparameters,
    check_policy_class,
    check_scheduled,
    check_spaces,
    read_model_file,
)
from sb3_reinforce.losses import entropy_loss, kl_divergence, policy_gradient_loss
from sb3_reinforce.natural_gradient import (
    InverseTimeDecay,
    assign,
    fisher_vector_product,
    flatten,
    length_of_divergence,
    natural_direction,
)
from sb3_reinforce.policies import (
    BaselineName,
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    action_values_of,
    baseline_features,
    chunk_size,
    evaluate,
    install_critics,
    normalizer_of,
    overrides,
)
from sb3_reinforce.returns import AdvantageName, batch_normalize
from sb3_reinforce.rollout import collect_episodes, environment_error, seed_next_episodes, seeds_episodes, skips_idle_envs
from sb3_reinforce.sampling import explain_nan, torch_seeded_from, update_rng
from sb3_reinforce.vec_env import EnvSource, EpisodeRunner, EpisodeSchedule, wrap_env
from sb3_reinforce.workers import Workers, attach_workers, collect_from_workers

SelfREINFORCE = TypeVar("SelfREINFORCE", bound="REINFORCE")


def clone(state: Any) -> Any:
    """A copy of nested dictionaries and lists of tensors, in a tenth of the time of a deep copy."""
    if isinstance(state, dict):
        return {key: clone(value) for key, value in state.items()}
    if isinstance(state, list):
        return [clone(value) for value in state]
    return state.clone() if isinstance(state, th.Tensor) else state


#: The Fisher matrix is that of so many states of the batch at most: more take time, and do not learn sooner
_FISHER_STATES = 256


class REINFORCE(OnPolicyAlgorithm):
    """
    REINFORCE: Monte-Carlo policy gradients with a closed-form state-value baseline and normalized advantages.

    Each iteration collects whole episodes with the current policy, computes the discounted return that followed every
    action, subtracts what the baseline (fitted to earlier batches) expected in that state, normalizes, and takes one step on
    ``-mean(log pi(a|s) * advantage)``. Then the baseline is fitted to the batch.

    By default, the step is in the direction of the (damped) natural gradient, and its length is such that the new policy has a
    divergence of ``target_kl`` from the old one. It needs no learning rate, and training can be stopped or continued at any
    time. This is REINFORCE in another metric, still one step a batch on data of the current policy. With ``target_kl=None``,
    it is the optimizer's step at the learning rate.

    Episodes are numbered over the life of a model. With a seed, the environment's seed and the noise of the actions of an
    episode depend on the seed and its number alone.

    Papers: Williams (1992), https://doi.org/10.1007/BF00992696; with a baseline: Sutton & Barto (2018), section 13.4. The
    step: Kakade (2001); Peters & Schaal (2008); Duan et al. (2016, TNPG), https://arxiv.org/abs/1604.06778; Rajeswaran et al.
    (2017), https://arxiv.org/abs/1703.02660.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy), or a subclass of these. Subclasses of
        SB3's ``ActorCriticPolicy`` work too: their critic branch is then the feature map of the baseline
    :param env: The environment to learn from: an id (made without a render mode), a function that makes it, an environment,
        or a ``VecEnv``. An ``EpisodeVecEnv`` runs the first three, and a plain ``DummyVecEnv``: each environment is reset
        once per episode and not stepped while it is idle. Other ``VecEnv`` are stepped as they are
    :param learning_rate: The learning rate of the optimizer (at least 0), it can be a function of the current progress
        remaining (from 1 to 0). Only with ``target_kl=None``
    :param n_steps: Steps to collect for each environment per update, at least 1, in the place of ``n_episodes``: episodes are
        started until ``n_steps * n_envs`` transitions have been collected in all, and all of them are finished. For episodes
        that are very long, or all of one length
    :param gamma: Discount factor per step, in (0, 1]. Lower looks less far ahead, with less noisy returns
    :param ent_coef: Entropy coefficient for the loss calculation, at least 0. Raise it if exploration ends too early
    :param target_kl: The Kullback-Leibler divergence of each step, in nats per transition (above 0, closed form, summed over
        the dimensions of the action), from the policy that has collected the batch: a number, a function of the current
        progress remaining, or an :class:`~sb3_reinforce.natural_gradient.InverseTimeDecay` (default: 0.0125 at first, half of
        it after 50 updates). What the observation statistics then move comes on top. More learns sooner and less reliably; a
        constant never settles. None for the optimizer's step at ``learning_rate``
    :param cg_max_steps: maximum number of steps in the Conjugate Gradient algorithm that finds the direction of the step, at
        least 1. More come closer to the natural gradient, and take time
    :param cg_damping: damping in the Hessian vector product computation, above 0: what is added to the diagonal of the Fisher
        matrix. Little is the natural gradient, much the plain one
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE) instead of action noise exploration
    :param sde_sample_freq: Sample a new noise matrix every n steps of an episode when using gSDE; -1: only at its beginning
    :param rollout_buffer_class: Rollout buffer class to use, a subclass of
        :class:`~sb3_reinforce.buffers.EpisodeRolloutBuffer`. If ``None``, that class itself
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param normalize_advantage: Whether to give the advantages of each batch mean 0 and standard deviation 1. Without it the
        learning rate has to suit the scale of the rewards
    :param n_episodes: Episodes to collect per update over all environments, at least 1 (more if there are more
        environments). 5 unless ``n_steps`` is given. Fewer make more but noisier updates. Where episodes grow longer as the
        policy gets better, there are many updates at first, and less noisy ones later
    :param max_episode_steps: Puts a ``TimeLimit`` of so many steps, at least 1, around the environment. Below its own limit,
        there are more episodes of the same steps where a policy may dawdle, as a lander that hovers does. None for no other
        limit than the environment's own; a ``VecEnv`` is made with its limits
    :param advantage: What tells how good an action was. "monte_carlo", the return minus the baseline's value of the state, is
        REINFORCE: unbiased, and noisy where returns are. The others are actor-critics, with less noise and the errors of a
        critic: "q", the value of the action by a critic of (state, action) that is fitted to returns as the baseline is;
        "advantage", that minus the baseline's value of the state; "td", the reward plus the discounted value of the next state
        minus that of the state. They are there to compare; see :mod:`sb3_reinforce.returns` for formulas and sources
    :param baseline: What the state-value baseline is linear in: "linear" (the features), "quadratic" (and their squares),
        "random_features" (and fixed random tanh units of them), or None for no baseline. Richer ones reduce the variance of
        the gradient when returns are no linear function of the state. For policies that are no subclass of those here, the
        critic branch takes the place of either map
    :param baseline_memory: Weight of the batches before the latest one in the fit of the baseline, per batch, in [0, 1). Less
        follows the policy faster, more has more episodes to fit the baseline to
    :param baseline_kwargs: "ridge" (at least 0: raise it if the baseline fits noise; 0 for "linear", 1e-5 for "quadratic",
        0.2 for "random_features" and where features are learned) and "n_units" of "random_features" (128)
    :param bootstrap_timeouts: Whether the baseline's value of the last observation is added to the reward when an episode
        ends by a time limit, as in SB3: what happens there says nothing about the state (Pardo et al., 2018,
        https://arxiv.org/abs/1712.00378). Turn it off where a time limit is part of the task, and with ``gamma=1``, where
        nothing discounts the errors that the baseline then learns of itself
    :param normalize_observations: Whether the policy normalizes vector observations with running statistics, which are
        updated once a batch and saved with it. None: with the policies here and their subclasses, the only ones that can
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average the reported
        success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for debug
        messages
    :param seed: Seed for the pseudo random generators. Without one, environments are not seeded, and a seed for the rest (the
        initial weights, the noise of the actions) is drawn from NumPy's global generator: ``run_seed``
    :param workers: Where episodes run: None for this process; a number of processes of this machine, at least 1, which end
        when ``learn()`` does (by loky: the extra ``workers``); or a ``concurrent.futures.Executor``, that of a cluster for
        instance. The environment must then be an id, an ``EnvSpec`` or a function that makes it. Training is that on one
        environment in this process to the last bit, whatever the number, which is not saved with a model
    :param episode_timeout: Seconds that an episode may take in a worker, above 0, before it counts as one that never ends.
        None for no limit
    :param device: Device (cpu, cuda, ...) on which the code should be run, "auto" for the GPU if possible
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: when an argument is out of its range, or the spaces of the environment are not supported
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    rollout_buffer: EpisodeRolloutBuffer

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: EnvSource | None,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int | None = None,
        gamma: float = 0.99,
        ent_coef: float = 0.0,
        target_kl: float | Schedule | InverseTimeDecay | None = InverseTimeDecay(0.0125, halving=50),
        cg_max_steps: int = 5,
        cg_damping: float = 10.0,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[EpisodeRolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        n_episodes: int | None = None,
        max_episode_steps: int | None = None,
        advantage: AdvantageName = "monte_carlo",
        baseline: BaselineName | None = "random_features",
        baseline_memory: float = 0.6,
        baseline_kwargs: dict[str, Any] | None = None,
        bootstrap_timeouts: bool = True,
        normalize_observations: bool | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        workers: int | Executor | None = None,
        episode_timeout: float | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        super().__init__(
            policy,
            None,  # type: ignore[arg-type]  # see _attach_env
            learning_rate=learning_rate,
            n_steps=n_steps,  # type: ignore[arg-type]
            gamma=gamma,
            gae_lambda=1.0,
            ent_coef=ent_coef,
            vf_coef=0.0,
            max_grad_norm=math.inf,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            device=device,
            seed=seed,
            _init_setup_model=False,
        )
        check_policy_class(self.policy_class)
        self.target_kl = target_kl
        self.cg_max_steps = cg_max_steps
        self.cg_damping = cg_damping
        self.normalize_advantage = normalize_advantage
        self.n_episodes = n_episodes
        self.workers = workers
        self.episode_timeout = episode_timeout
        self.max_episode_steps = max_episode_steps
        self.advantage = advantage
        self.baseline = baseline
        self.baseline_memory = baseline_memory
        self.baseline_kwargs = baseline_kwargs or {}
        self.bootstrap_timeouts = bootstrap_timeouts
        if normalize_observations is None:
            normalize_observations = issubclass(self.policy_class, MlpPolicy)
        self.normalize_observations = normalize_observations
        # Number of the first episode of the next batch
        self._next_episode = 0
        # Updates since num_timesteps was 0
        self._n_iterations = 0
        #: Seed of all that is random in a run but the environments: ``seed``, or one that is drawn
        self.run_seed: Any = seed
        # What a file gets while a rollout or its update is on; what had been logged then, and not been written
        self._rollout_start: dict[str, Any] | None = None
        self._logged: dict[str, Any] = {}
        self._has_told = False
        self._running_workers: Workers | None = None
        # By the clock, None before the first rollout of a call of learn()
        self._rollout_end: float | None = None

        if env is not None:
            self._attach_env(env, policy)
        elif _init_setup_model:
            raise ValueError("env=None has no spaces to make a policy for: give an environment, or _init_setup_model=False")
        if _init_setup_model:
            self._setup_model()

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
        if self.n_steps is None and self.n_episodes is None:
            self.n_episodes = 5
        check_hyperparameters(self)
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
        is_own = issubclass(self.policy_class, MlpPolicy)
        action_values = self.advantage in ("q", "advantage")
        own_kwargs: dict[str, Any] = dict(
            baseline=self.baseline,
            baseline_memory=self.baseline_memory,
            baseline_kwargs=self.baseline_kwargs,
            normalize_observations=self.normalize_observations,
            action_values=action_values,
        )
        # A seed that was drawn makes the same weights as one that is given, and leaves PyTorch's generator as it was
        with th.random.fork_rng(devices=[], enabled=self.seed is None):
            th.default_generator.manual_seed(self.run_seed)
            policy = self.policy_class(
                self.observation_space,
                self.action_space,
                self.lr_schedule,
                use_sde=self.use_sde,
                **(own_kwargs if is_own else {}),
                **self.policy_kwargs,
            )
        assert isinstance(policy, ActorCriticPolicy)
        if not is_own:
            install_critics(policy, self.baseline, self.baseline_memory, self.baseline_kwargs, action_values)
        self.policy = policy.to(self.device)
        self._maybe_recommend_cpu("MlpPolicy")

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

        values, action_values, features = rollout_buffer.values, None, None
        if np.isnan(values).any():
            features = self._baseline_features()
            values = self.policy.value_net.predict(features).cpu().numpy().flatten()  # type: ignore[operator]
        if (critic := action_values_of(self.policy)) is not None:
            features = self._baseline_features() if features is None else features
            action_values = critic.predict(features, self._actions()).cpu().numpy().flatten()
        rollout_buffer.compute_returns_and_advantage(values, action_values, self.advantage)

        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def train(self) -> None:
        """
        Take one step on the whole batch, then refit the baseline to it.

        Whatever interrupts this, policy, optimizer and counters are afterwards either as before it or as after it.

        :raises ValueError: when the gradient, or the policy after the step, is not finite
        """
        buffer, policy = self.rollout_buffer, self.policy
        self._refresh_optimizer()
        advantage_std = float(buffer.advantages.std())
        if self.normalize_advantage:
            buffer.advantages = batch_normalize(buffer.advantages)

        names = ("_n_updates", "_next_episode", "_n_iterations", "_rollout_start")
        before = clone(self.get_parameters()), {name: getattr(self, name) for name in names}
        try:
            # The gradient of the loss over the whole batch, in train mode (this affects batch norm / dropout)
            policy.set_training_mode(True)
            policy.zero_grad()
            losses: dict[str, float] = defaultdict(float)
            with torch_seeded_from(update_rng(self.run_seed, self._n_updates), self.device):
                for batch in self._batches():
                    for name, part in self._add_gradient(batch).items():
                        losses[name] += part * len(batch.returns) / buffer.size()
            grad_norm = self._gradient_norm()
            policy.set_training_mode(False)

            # The step
            old, _ = self._evaluate_batch()
            if self.target_kl is None:
                divergence, features = self._optimizer_step(old)
            else:
                divergence, features = self._natural_step(old)

            # The critics, in features as they are from now on
            if (normalizer := normalizer_of(policy)) is not None:
                normalizer.update(buffer.observations)
                features = self._baseline_features()
            policy.value_net.fit(features.cpu().numpy(), buffer.returns)  # type: ignore[operator]
            if (critic := action_values_of(policy)) is not None:
                critic.fit(features, self._actions(), buffer.returns)

            self.logger.record("train/n_updates", self._n_updates + 1, exclude="tensorboard")
            for name, value in losses.items():
                self.logger.record(f"train/{name}", value)
            self.logger.record("train/grad_norm", grad_norm)
            if divergence is not None:
                self.logger.record("train/kl_divergence_loss", divergence)
            self.logger.record("train/advantage_std", advantage_std)
            self._log_critics()
            if hasattr(policy, "log_std"):
                self.logger.record("train/std", th.exp(policy.log_std).mean().item())

            # At once: a file has either all or nothing of the update
            n_episodes = int(buffer.episode_starts.sum())
            after = (self._n_updates + 1, self._next_episode + n_episodes, self._n_iterations + 1, None)
            self.__dict__.update(zip(names, after, strict=True))
        except BaseException:
            super().set_parameters(before[0])
            self.__dict__.update(before[1])
            policy.set_training_mode(False)
            raise

    def _refresh_optimizer(self) -> None:
        """Let the optimizer have the parameters of the policy, if something has replaced them: others would learn nothing."""
        optimizer, parameters = self.policy.optimizer, list(self.policy.parameters())
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        current = {id(parameter) for parameter in parameters}
        # What is known alone is of SB3's value layer, which the baseline has replaced; what is not may not be meant to learn
        if known <= current or current <= known:
            return
        if len(optimizer.param_groups) > 1:
            raise ValueError(
                "The optimizer has parameters that are no longer in the policy: change them in place (copy_()), or make "
                "policy.optimizer anew"
            )
        optimizer.param_groups[0]["params"] = parameters
        for parameter in [parameter for parameter in optimizer.state if id(parameter) not in current]:
            del optimizer.state[parameter]

    def _log_critics(self) -> None:
        """How well the critic that is used has predicted the returns, before it was fitted to them. One advantage uses two."""
        buffer = self.rollout_buffer
        predicted: dict[str, Any] = {"": buffer.action_values if self.advantage == "q" else buffer.values}
        if self.advantage == "advantage":
            predicted["action_"] = buffer.action_values
        for kind, values in predicted.items():
            self.logger.record(f"train/{kind}explained_variance", explained_variance(values, buffer.returns))
            self.logger.record(f"train/{kind}value_loss", float(np.mean((buffer.returns - values) ** 2)))

    def _actions(self) -> th.Tensor:
        """(n_transitions, action_dim) the actions of the batch, as they were sampled."""
        return th.as_tensor(self.rollout_buffer.actions, device=self.device)

    def _batches(self) -> Generator[EpisodeBufferSamples, None, None]:
        """The transitions of the batch, as many at a time as the policy should be shown."""
        return self.rollout_buffer.get(chunk_size(self.policy))

    # Ctrl-C at an unlucky moment leaves PyTorch without gradients
    @th.enable_grad()
    def _add_gradient(self, batch: EpisodeBufferSamples) -> dict[str, float]:
        """
        Add what some transitions contribute to the gradient of the loss.

        :return: the parts of their loss without coefficients
        """
        policy = self.policy
        is_discrete = isinstance(self.action_space, spaces.Discrete)
        actions = batch.actions.long().flatten() if is_discrete else batch.actions
        with explain_nan():
            if overrides(policy, "evaluate_actions"):
                _, log_prob, entropy = policy.evaluate_actions(batch.observations, actions)
            else:
                distribution, _ = evaluate(policy, batch.observations)
                log_prob, entropy = distribution.log_prob(actions), distribution.entropy()
        parts = dict(
            policy_gradient_loss=policy_gradient_loss(log_prob, batch.advantages),
            entropy_loss=entropy_loss(log_prob, entropy),
        )
        loss = parts["policy_gradient_loss"] + self.ent_coef * parts["entropy_loss"]
        (loss * len(batch.returns) / self.rollout_buffer.size()).backward()
        return {name: part.item() for name, part in parts.items()}

    def _gradient_norm(self) -> float:
        """The norm of the gradient, or a ValueError if it is not finite."""
        gradients = [parameter.grad for parameter in self.policy.parameters() if parameter.grad is not None]
        grad_norm = flatten(gradients).norm().item()
        if not math.isfinite(grad_norm):
            raise ValueError(
                f"The gradient of update {self._n_updates + 1} is not finite: the step was not taken. Scale down what is too "
                "large: rewards, observations or coefficients"
            )
        return grad_norm

    def _evaluate_batch(self) -> tuple[list[Distribution], th.Tensor]:
        """
        :return: the distributions of the actions, part by part, in evaluation mode; and what the baseline is linear in,
            (n_transitions, n_features), unless the observation statistics are still to change
        """
        distributions, features = [], []
        with th.no_grad(), explain_nan():
            for batch in self._batches():
                distribution, vf_features = evaluate(self.policy, batch.observations)
                distributions.append(copy(distribution))
                if normalizer_of(self.policy) is None:
                    features.append(baseline_features(self.policy, batch.observations, vf_features))
        return distributions, th.cat(features) if features else th.empty(0)

    def _baseline_features(self) -> th.Tensor:
        """(n_transitions, n_features) what the baseline is linear in, in the states of the batch."""
        with th.no_grad():
            return th.cat([baseline_features(self.policy, batch.observations) for batch in self._batches()])

    def _divergence(self, old: list[Distribution]) -> tuple[float | None, th.Tensor]:
        """
        :param old: distributions of the actions before the step, see :meth:`_evaluate_batch`
        :return: mean divergence from these, None if it has no closed form; and the features
        """
        new, features = self._evaluate_batch()
        try:
            with th.no_grad():
                return th.cat([kl_divergence(*pair) for pair in zip(old, new, strict=True)]).mean().item(), features
        except NotImplementedError:
            return None, features

    def _optimizer_step(self, old: list[Distribution]) -> tuple[float | None, th.Tensor]:
        """Take the optimizer's step at the learning rate. Arguments and results are those of :meth:`_divergence`."""
        check_scheduled("learning_rate", self.lr_schedule(self._current_progress_remaining), self._current_progress_remaining)
        self._update_learning_rate(self.policy.optimizer)
        self.policy.optimizer.step()
        try:
            divergence, features = self._divergence(old)
            if divergence is not None and not math.isfinite(divergence):
                raise ValueError("The new policy is infinitely far from the old one")
        except ValueError as error:
            raise ValueError(f"Update {self._n_updates + 1} was undone: lower the learning rate. {error}") from error
        return divergence, features

    def _natural_step(self, old: list[Distribution]) -> tuple[float | None, th.Tensor]:
        """Take a step of ``target_kl`` along the natural gradient. Arguments and results are those of :meth:`_divergence`."""
        schedule = self.target_kl
        time = self._n_updates if isinstance(schedule, InverseTimeDecay) else self._current_progress_remaining
        target_kl = float(schedule(time) if callable(schedule) else schedule)  # type: ignore[arg-type]
        check_scheduled("target_kl", target_kl, self._current_progress_remaining)
        trained = (parameter for group in self.policy.optimizer.param_groups for parameter in group["params"])
        parameters = [parameter for parameter in trained if parameter.grad is not None]
        gradient = flatten(parameter.grad for parameter in parameters)
        if target_kl == 0 or not gradient.any():
            return self._divergence(old)

        try:
            product = fisher_vector_product(self._self_divergence(), parameters)
        except NotImplementedError as error:
            name = type(old[0]).__name__
            raise ValueError(f"The divergence of a {name} has no closed form: target_kl must be None with it") from error
        direction = natural_direction(-gradient, product, self.cg_damping, self.cg_max_steps)
        curvature = direction @ product(direction)
        start = flatten(parameters).detach()
        result: Any = None

        def divergence_at(length: float) -> float:
            nonlocal result
            assign(parameters, start + length * direction)
            try:
                result = self._divergence(old)
            except ValueError:
                # The distributions are not defined any more
                return math.inf
            return result[0]

        # To the second order, the divergence is half the squared length times the curvature
        length_of_divergence(divergence_at, target_kl, math.sqrt(2 * target_kl / max(curvature.item(), 1e-12)))
        # PyTorch does not always check its distributions: after torch.compile, no process does
        if result is None or not math.isfinite(result[0]):
            raise ValueError(f"Update {self._n_updates + 1} was undone: no step along its gradient leaves the policy finite")
        return result

    @th.enable_grad()
    def _self_divergence(self) -> th.Tensor:
        """The mean divergence of the policy from itself in some states of the batch: 0, with gradients of the second order."""
        # What is compiled has no second gradients
        policy: Any = getattr(self.policy, "_orig_mod", self.policy)
        states = self.rollout_buffer.spread(min(_FISHER_STATES, chunk_size(policy))).observations
        # PyTorch's fast attention has no second derivatives either
        with sdpa_kernel(SDPBackend.MATH):
            with th.no_grad():
                old = copy(evaluate(policy, states)[0])
            return kl_divergence(old, evaluate(policy, states)[0]).mean()

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
        self: SelfREINFORCE,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "REINFORCE",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfREINFORCE:
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
        cls: type[SelfREINFORCE],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: EnvSource | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> SelfREINFORCE:
        """
        Load the model from a zip-file, see SB3's ``BaseAlgorithm.load``.

        ``load(path, env).learn(rest, reset_num_timesteps=False)`` continues a seeded run as if it had not been stopped: to the
        last bit, on the same machine, on an :class:`~sb3_reinforce.vec_env.EpisodeVecEnv` that no wrapper steps along, with an
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
        content, saved = read_model_file(path, changes)
        if env is not None:
            env = wrap_env(env, changes.get("max_episode_steps", saved.get("max_episode_steps")), saved.get("verbose", 0))
            attach_workers(changes.get("workers"), env)
        return super().load(content, env, *args, **kwargs)
