"""The REINFORCE algorithm."""

import math
from collections import defaultdict
from collections.abc import Generator
from concurrent.futures import Executor
from copy import copy
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.utils import explained_variance
from torch.nn.attention import SDPBackend, sdpa_kernel

from sb3_reinforce.checks import check_hyperparameters
from sb3_reinforce.episodes.acting import baseline_features, evaluate, explain_nan, overrides, torch_seeded_from
from sb3_reinforce.episodes.algorithm import EpisodicAlgorithm
from sb3_reinforce.episodes.buffer import EpisodeBufferSamples, EpisodeRolloutBuffer
from sb3_reinforce.episodes.checks import check_scheduled
from sb3_reinforce.episodes.normalization import normalizer_of
from sb3_reinforce.episodes.schedule import update_rng
from sb3_reinforce.episodes.vec_env import EnvSource
from sb3_reinforce.natural_gradient import InverseTimeDecay, flatten, natural_step
from sb3_reinforce.policies import (
    BaselineName,
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    action_values_of,
    chunk_size,
    install_critics,
)
from sb3_reinforce.returns import (
    AdvantageName,
    action_advantages,
    batch_normalize,
    discounted_returns,
    entropy_loss,
    kl_divergence,
    monte_carlo_advantages,
    policy_gradient_loss,
    q_advantages,
    td_advantages,
)

SelfREINFORCE = TypeVar("SelfREINFORCE", bound="REINFORCE")

#: The Fisher matrix is that of so many states of the batch at most: more take time, and do not learn sooner
_FISHER_STATES = 256


class REINFORCE(EpisodicAlgorithm):
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
        :class:`~sb3_reinforce.EpisodeRolloutBuffer`. If ``None``, that class itself
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
    _fixed_arguments = ("advantage", "baseline", "baseline_memory", "baseline_kwargs", "normalize_observations")

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
            env,
            learning_rate,
            n_steps,
            n_episodes,
            max_episode_steps,
            bootstrap_timeouts,
            workers,
            episode_timeout,
            gamma=gamma,
            ent_coef=ent_coef,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
        )
        self.target_kl = target_kl
        self.cg_max_steps = cg_max_steps
        self.cg_damping = cg_damping
        self.normalize_advantage = normalize_advantage
        self.advantage = advantage
        self.baseline = baseline
        self.baseline_memory = baseline_memory
        self.baseline_kwargs = baseline_kwargs or {}
        if normalize_observations is None:
            normalize_observations = issubclass(self.policy_class, MlpPolicy)
        self.normalize_observations = normalize_observations
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        if self.n_steps is None and self.n_episodes is None:
            self.n_episodes = 5
        check_hyperparameters(self)
        super()._setup_model()

    def _make_policy(self) -> ActorCriticPolicy:
        is_own = issubclass(self.policy_class, MlpPolicy)
        action_values = self.advantage in ("q", "advantage")
        own_kwargs: dict[str, Any] = dict(
            baseline=self.baseline,
            baseline_memory=self.baseline_memory,
            baseline_kwargs=self.baseline_kwargs,
            normalize_observations=self.normalize_observations,
            action_values=action_values,
        )
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
        return policy

    def _compute_advantages(self) -> None:
        """Compute the returns of the batch, and how much better each action was than expected."""
        buffer, gamma = self.rollout_buffer, self.gamma
        buffer.returns = discounted_returns(buffer.rewards, buffer.episode_starts, gamma)
        critic = action_values_of(self.policy)
        if critic is not None or np.isnan(buffer.values).any():
            features = self._baseline_features()
            if np.isnan(buffer.values).any():
                buffer.values = self.policy.value_net.predict(features).cpu().numpy().flatten()  # type: ignore[operator]
            if critic is not None:
                buffer.action_values = critic.predict(features, self._actions()).cpu().numpy().flatten()
        if self.advantage == "monte_carlo":
            buffer.advantages = monte_carlo_advantages(buffer.returns, buffer.values)
        elif self.advantage == "td":
            buffer.advantages = td_advantages(buffer.rewards, buffer.episode_starts, buffer.values, gamma)
        elif self.advantage == "q":
            buffer.advantages = q_advantages(buffer.action_values)
        else:
            buffer.advantages = action_advantages(buffer.action_values, buffer.values)

    def train(self) -> None:
        """
        Take one step on the whole batch, then refit the baseline to it.

        Whatever interrupts this, policy, optimizer and counters are afterwards either as before it or as after it.

        :raises ValueError: when the gradient, or the policy after the step, is not finite
        """
        buffer, policy = self.rollout_buffer, self.policy
        self._refresh_optimizer()
        self.logger.record("train/n_updates", self._n_updates + 1, exclude="tensorboard")
        self.logger.record("train/advantage_std", float(buffer.advantages.std()))
        if self.normalize_advantage:
            buffer.advantages = batch_normalize(buffer.advantages)

        with self._all_or_nothing():
            self._compute_gradient()
            old = self._distributions()
            divergence = self._optimizer_step(old) if self.target_kl is None else self._natural_step(old)
            if divergence is not None:
                self.logger.record("train/kl_divergence_loss", divergence)
            if hasattr(policy, "log_std"):
                self.logger.record("train/std", th.exp(policy.log_std).mean().item())

            # The critics, in features as they are from now on
            if (normalizer := normalizer_of(policy)) is not None:
                normalizer.update(buffer.observations)
            features = self._baseline_features()
            policy.value_net.fit(features.cpu().numpy(), buffer.returns)  # type: ignore[operator]
            if (critic := action_values_of(policy)) is not None:
                critic.fit(features, self._actions(), buffer.returns)
            self._log_critics()

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
    def _compute_gradient(self) -> None:
        """
        Compute the gradient of the loss over the whole batch, in train mode (this affects batch norm / dropout).

        :raises ValueError: when it is not finite
        """
        policy, losses = self.policy, defaultdict[str, float](float)
        policy.set_training_mode(True)
        policy.zero_grad()
        with torch_seeded_from(update_rng(self.run_seed, self._n_updates), self.device):
            for batch in self._batches():
                weight = len(batch.returns) / self.rollout_buffer.size()
                log_prob, entropy = self._evaluate_actions(batch)
                parts = dict(
                    policy_gradient_loss=policy_gradient_loss(log_prob, batch.advantages),
                    entropy_loss=entropy_loss(log_prob, entropy),
                )
                loss = parts["policy_gradient_loss"] + self.ent_coef * parts["entropy_loss"]
                (loss * len(batch.returns) / self.rollout_buffer.size()).backward()
                for name, part in parts.items():
                    losses[name] += part.item() * weight
        policy.set_training_mode(False)
        grad_norm = flatten(parameter.grad for parameter in policy.parameters() if parameter.grad is not None).norm().item()
        if not math.isfinite(grad_norm):
            raise ValueError(
                f"The gradient of update {self._n_updates + 1} is not finite: the step was not taken. Scale down what is too "
                "large: rewards, observations or coefficients"
            )
        for name, value in losses.items():
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/grad_norm", grad_norm)

    def _evaluate_actions(self, batch: EpisodeBufferSamples) -> tuple[th.Tensor, th.Tensor | None]:
        """:return: log-probabilities of the actions of some transitions, and the entropies of their distributions"""
        is_discrete = isinstance(self.action_space, spaces.Discrete)
        actions = batch.actions.long().flatten() if is_discrete else batch.actions
        with explain_nan():
            if overrides(self.policy, "evaluate_actions"):
                return self.policy.evaluate_actions(batch.observations, actions)[1:]
            distribution, _ = evaluate(self.policy, batch.observations)
            return distribution.log_prob(actions), distribution.entropy()

    def _distributions(self) -> list[Distribution]:
        """The distributions of the actions in the states of the batch, part by part, in evaluation mode."""
        with th.no_grad(), explain_nan():
            return [copy(evaluate(self.policy, batch.observations)[0]) for batch in self._batches()]

    def _baseline_features(self) -> th.Tensor:
        """(n_transitions, n_features) what the baseline is linear in, in the states of the batch."""
        with th.no_grad():
            return th.cat([baseline_features(self.policy, batch.observations) for batch in self._batches()])

    def _divergence(self, old: list[Distribution]) -> float | None:
        """:return: mean divergence from distributions before the step, None if it has no closed form"""
        new = self._distributions()
        try:
            with th.no_grad():
                return th.cat([kl_divergence(*pair) for pair in zip(old, new, strict=True)]).mean().item()
        except NotImplementedError:
            return None

    def _optimizer_step(self, old: list[Distribution]) -> float | None:
        """Take the optimizer's step at the learning rate. The argument and the result are those of :meth:`_divergence`."""
        check_scheduled("learning_rate", self.lr_schedule(self._current_progress_remaining), self._current_progress_remaining)
        self._update_learning_rate(self.policy.optimizer)
        self.policy.optimizer.step()
        try:
            divergence = self._divergence(old)
            if divergence is not None and not math.isfinite(divergence):
                raise ValueError("The new policy is infinitely far from the old one")
        except ValueError as error:
            raise ValueError(f"Update {self._n_updates + 1} was undone: lower the learning rate. {error}") from error
        return divergence

    def _natural_step(self, old: list[Distribution]) -> float | None:
        """Take a step of ``target_kl`` along the natural gradient. Arguments and results are those of :meth:`_divergence`."""
        schedule = self.target_kl
        time = self._n_updates if isinstance(schedule, InverseTimeDecay) else self._current_progress_remaining
        target_kl = float(schedule(time) if callable(schedule) else schedule)  # type: ignore[arg-type]
        check_scheduled("target_kl", target_kl, self._current_progress_remaining)
        trained = (parameter for group in self.policy.optimizer.param_groups for parameter in group["params"])
        parameters = [parameter for parameter in trained if parameter.grad is not None]
        if target_kl == 0 or not any(parameter.grad.any() for parameter in parameters):
            return self._divergence(old)
        try:
            divergence: Any = lambda: self._divergence(old)  # noqa: E731
            return natural_step(parameters, self._self_divergence(), divergence, target_kl, self.cg_damping, self.cg_max_steps)
        except NotImplementedError as error:
            name = type(old[0]).__name__
            raise ValueError(f"The divergence of a {name} has no closed form: target_kl must be None with it") from error
        except ValueError as error:
            raise ValueError(f"Update {self._n_updates + 1} was undone: {error}") from error

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

    def learn(
        self: SelfREINFORCE,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "REINFORCE",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfREINFORCE:
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
