"""The REINFORCE algorithm."""

import math
from collections import defaultdict
from concurrent.futures import Executor
from copy import copy
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import explained_variance

from sb3_reinforce import returns
from sb3_reinforce.checks import check_hyperparameters
from sb3_reinforce.episodes.acting import overrides
from sb3_reinforce.episodes.algorithm import EpisodicAlgorithm
from sb3_reinforce.episodes.buffer import EpisodeRolloutBuffer
from sb3_reinforce.episodes.checks import check_scheduled
from sb3_reinforce.episodes.schedule import torch_seeded_from, update_rng
from sb3_reinforce.episodes.vec_env import EnvSource
from sb3_reinforce.natural_gradient import InverseTimeDecay, fisher_vector_product, flatten, natural_step, self_divergence
from sb3_reinforce.policies import BaselineName, BaselinePolicy, CnnPolicy, MlpPolicy, MultiInputPolicy, with_baseline

#: Maximum number of states used to estimate the Fisher matrix
_FISHER_STATES = 256
#: Action distributions and the critic's extracted features in the states of a batch, by chunk
Evaluations = list[tuple[Distribution, th.Tensor]]


class REINFORCE(EpisodicAlgorithm):
    """
    REINFORCE: Monte-Carlo policy gradients with a closed-form state-value baseline and normalized advantages.

    Each iteration collects whole episodes with the current policy, computes discounted returns, subtracts the baseline (fitted
    to earlier batches), normalizes the result, and takes one step on ``-mean(log pi(a|s) * advantage)``. Then the baseline is
    fitted to the batch. The step follows the damped natural gradient, and ``target_kl`` sets its length; with
    ``target_kl=None``, it is a step of the optimizer at ``learning_rate``.

    Paper: Williams (1992), https://doi.org/10.1007/BF00992696; with a baseline: Sutton & Barto (2018), section 13.4. Natural
    gradient: Kakade (2001); Peters & Schaal (2008); Duan et al. (2016, TNPG), https://arxiv.org/abs/1604.06778

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy), or a subclass of ``ActorCriticPolicy``
    :param env: The environment to learn from: an id, a function that makes it, an environment, or a ``VecEnv``. All run in an
        :class:`~sb3_reinforce.EpisodeVecEnv`, except a ``VecEnv`` that is not a plain ``DummyVecEnv``
    :param learning_rate: The learning rate of the optimizer, at least 0, or a function of the current progress remaining (from
        1 to 0). Only used with ``target_kl=None``
    :param n_steps: Minimum number of steps to run for each environment per update, at least 1, instead of ``n_episodes``, for
        episodes that are very long or of one length. All episodes that are started are finished
    :param gamma: Discount factor, in (0, 1]. Lower values reduce the variance of returns, and ignore distant rewards
    :param ent_coef: Entropy coefficient for the loss calculation, at least 0. Raise it if exploration ends too early
    :param target_kl: Kullback-Leibler divergence of the new policy from the old one, in nats per transition, summed over
        action dimensions: a number above 0, a function of the current progress remaining, an
        :class:`~sb3_reinforce.InverseTimeDecay` of the number of updates (default: 0.0125, halved after 50), or None for the
        optimizer's step. Larger values learn faster and less reliably; with a constant, the policy never settles
    :param cg_max_steps: Maximum number of steps of the conjugate gradient algorithm, at least 1
    :param cg_damping: Damping in the Hessian vector product computation, above 0. Small values give the natural gradient,
        large values the plain one
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE) instead of action noise exploration
    :param sde_sample_freq: Sample a new noise matrix every n steps of an episode when using gSDE. -1: only at its beginning
    :param rollout_buffer_class: Rollout buffer class to use, a subclass of :class:`~sb3_reinforce.EpisodeRolloutBuffer`
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param normalize_advantage: Whether to normalize the advantages of each batch
    :param n_episodes: Minimum number of episodes per update, over all environments, at least 1 (default: 5 unless ``n_steps``
        is given). Fewer episodes give more but noisier updates
    :param max_episode_steps: Number of steps of a ``TimeLimit`` around the environment, at least 1, or None. A low limit gives
        more episodes per step if a policy wastes time. Not for a ``VecEnv``
    :param advantage: Advantage function: "monte_carlo" is REINFORCE; "q", "advantage" and "td" are actor-critics, for
        comparison. See :mod:`sb3_reinforce.returns` for formulas and sources
    :param baseline: Features of the state-value baseline: "linear" (observations), "random_features" (and fixed random tanh
        units of them), or None for no baseline. Features that explain more of the returns reduce the variance of the gradient
    :param baseline_memory: Weight of earlier batches in the fit of the baseline, relative to the next batch, in [0, 1). Lower
        values follow the policy faster, higher values fit more episodes
    :param baseline_kwargs: "ridge", at least 0 (default: 0 for "linear", 0.2 for "random_features" and learned features; raise
        it if the baseline fits noise), and "n_units" of "random_features" (default: 128)
    :param bootstrap_timeouts: Whether to add the baseline's value of the last observation to the reward at a time limit, as in
        SB3 (Pardo et al., 2018, https://arxiv.org/abs/1712.00378). Disable it if the time limit is part of the task, and
        with ``gamma=1``, because the baseline then fits its own errors
    :param normalize_observations: Whether the policy normalizes vector observations with running statistics, which are updated
        once per batch and saved with it. None: only with the policies of this package and their subclasses
    :param stats_window_size: Number of episodes to average the reported success rate, episode length, and reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for debug
    :param seed: Seed for the pseudo random generators. If None, environments are not seeded, and ``run_seed`` (for the weights
        and the action noise) is drawn from NumPy's global generator
    :param workers: Where episodes run: None for this process, a number of processes (with loky: the extra ``workers``), or a
        ``concurrent.futures.Executor``, e.g. of a cluster. The environment must then be an id, an ``EnvSpec`` or a function.
        Results do not depend on the number of workers, which is not saved
    :param device: Device (cpu, cuda, ...) on which the code should be run, "auto" for the GPU if possible
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if an argument is out of its range, or a space of the environment is not supported
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: BaselinePolicy
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
        advantage: returns.AdvantageName = "monte_carlo",
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
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        kwargs: dict[str, Any] = dict(gamma=gamma, ent_coef=ent_coef, use_sde=use_sde, sde_sample_freq=sde_sample_freq)
        kwargs |= dict(rollout_buffer_class=rollout_buffer_class, rollout_buffer_kwargs=rollout_buffer_kwargs)
        kwargs |= dict(stats_window_size=stats_window_size, tensorboard_log=tensorboard_log, policy_kwargs=policy_kwargs)
        kwargs |= dict(verbose=verbose, seed=seed, device=device, workers=workers, bootstrap_timeouts=bootstrap_timeouts)
        super().__init__(policy, env, learning_rate, n_steps, n_episodes, max_episode_steps, **kwargs)
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
        return with_baseline(self.policy_class)(
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            use_sde=self.use_sde,
            baseline=self.baseline,
            baseline_memory=self.baseline_memory,
            baseline_kwargs=self.baseline_kwargs,
            normalize_observations=self.normalize_observations,
            action_values=self.advantage in ("q", "advantage"),
            **self.policy_kwargs,
        )

    def _compute_advantages(self) -> None:
        buffer, policy = self.rollout_buffer, self.policy
        buffer.returns = returns.discounted_returns(buffer.rewards, buffer.episode_starts, self.gamma)
        # The critics are fitted to earlier batches
        if policy.action_value_net is not None or np.isnan(buffer.values).any():
            features, actions = self._critic_inputs(self._evaluate_batch())
            buffer.values = policy.value_net.predict(features).cpu().numpy().flatten()  # type: ignore[operator]
            if policy.action_value_net is not None:
                buffer.action_values = policy.action_value_net.predict(features, actions).cpu().numpy().flatten()
        if self.advantage == "monte_carlo":
            buffer.advantages = returns.monte_carlo_advantages(buffer.returns, buffer.values)
        elif self.advantage == "q":
            buffer.advantages = returns.q_advantages(buffer.action_values)
        elif self.advantage == "advantage":
            buffer.advantages = returns.action_advantages(buffer.action_values, buffer.values)
        else:
            buffer.advantages = returns.td_advantages(buffer.rewards, buffer.episode_starts, buffer.values, self.gamma)

    def train(self) -> None:
        """
        Update the policy with one step on the whole batch, then fit the critics to it. An error or Ctrl-C leaves the model as
        it was before, for example a ValueError because the gradient, or the policy after the step, is not finite.
        """
        buffer, policy = self.rollout_buffer, self.policy
        self.logger.record("train/n_updates", self._n_updates + 1, exclude="tensorboard")
        self.logger.record("train/advantage_std", float(buffer.advantages.std()))
        if self.normalize_advantage:
            buffer.advantages = returns.batch_normalize(buffer.advantages)

        with self._all_or_nothing():
            self._compute_gradient()
            old = self._evaluate_batch()
            new = self._optimizer_step(old) if self.target_kl is None else self._natural_step(old)
            if (divergence := self._divergence(old, new)) is not None:
                self.logger.record("train/kl_divergence_loss", divergence)
            if hasattr(policy, "log_std"):
                self.logger.record("train/std", th.exp(policy.log_std).mean().item())

            if policy.observation_normalizer is not None:
                policy.observation_normalizer.update(buffer.observations)
                new = self._evaluate_batch()
            features, actions = self._critic_inputs(new)
            policy.value_net.fit(features.cpu().numpy(), buffer.returns)  # type: ignore[operator]
            if policy.action_value_net is not None:
                policy.action_value_net.fit(features, actions, buffer.returns)

            # How well the critics predicted the returns before they were fitted to them
            predictions = {"": buffer.action_values if self.advantage == "q" else buffer.values}
            if self.advantage == "advantage":
                predictions["action_"] = buffer.action_values
            for kind, values in predictions.items():
                self.logger.record(f"train/{kind}explained_variance", explained_variance(values, buffer.returns))
                self.logger.record(f"train/{kind}value_loss", float(np.mean((buffer.returns - values) ** 2)))

    @th.enable_grad()
    def _compute_gradient(self) -> None:
        """Compute the gradient of the loss over the whole batch, in train mode (this affects batch norm / dropout)."""
        policy, buffer, is_discrete = self.policy, self.rollout_buffer, isinstance(self.action_space, spaces.Discrete)
        losses: dict[str, float] = defaultdict(float)
        policy.set_training_mode(True)
        policy.zero_grad()
        with torch_seeded_from(update_rng(self.run_seed, self._n_updates), self.device):
            for batch in buffer.get(policy.chunk_size()):
                actions = batch.actions.long().flatten() if is_discrete else batch.actions
                if overrides(policy, "evaluate_actions"):
                    _, log_prob, entropy = policy.evaluate_actions(batch.observations, actions)
                else:
                    distribution, _ = policy.evaluate_observations(batch.observations)
                    log_prob, entropy = distribution.log_prob(actions), distribution.entropy()
                policy_gradient_loss = returns.policy_gradient_loss(log_prob, batch.advantages)
                entropy_loss = returns.entropy_loss(log_prob, entropy)
                loss = policy_gradient_loss + self.ent_coef * entropy_loss
                (loss * len(actions) / buffer.size()).backward()
                losses["policy_gradient_loss"] += policy_gradient_loss.item() * len(actions) / buffer.size()
                losses["entropy_loss"] += entropy_loss.item() * len(actions) / buffer.size()
        policy.set_training_mode(False)
        losses["grad_norm"] = flatten(p.grad for p in policy.parameters() if p.grad is not None).norm().item()
        if not math.isfinite(losses["grad_norm"]):
            raise ValueError(
                f"The gradient of update {self._n_updates + 1} is not finite, and the step was not taken. Scale down rewards, "
                "observations or coefficients"
            )
        for name, value in losses.items():
            self.logger.record(f"train/{name}", value)

    def _optimizer_step(self, old: Evaluations) -> Evaluations:
        """Take a step of the optimizer. Return the evaluations of the new policy."""
        check_scheduled("learning_rate", self.lr_schedule(self._current_progress_remaining), self._current_progress_remaining)
        self._update_learning_rate(self.policy.optimizer)
        self.policy.optimizer.step()
        try:
            new = self._evaluate_batch()
            divergence = self._divergence(old, new)
            if divergence is not None and not math.isfinite(divergence):
                raise ValueError("The divergence of the new policy from the old one is infinite")
        except ValueError as error:
            raise ValueError(f"Update {self._n_updates + 1} was undone: lower the learning rate. {error}") from error
        return new

    def _natural_step(self, old: Evaluations) -> Evaluations:
        """Take a step of ``target_kl`` along the natural gradient. Return the evaluations of the new policy."""
        schedule: Any = self.target_kl
        time = self._n_updates if isinstance(schedule, InverseTimeDecay) else self._current_progress_remaining
        target_kl = float(schedule(time) if callable(schedule) else schedule)
        check_scheduled("target_kl", target_kl, self._current_progress_remaining)
        trained = (parameter for group in self.policy.optimizer.param_groups for parameter in group["params"])
        parameters = [parameter for parameter in trained if parameter.grad is not None]
        if target_kl == 0 or not any(parameter.grad.any() for parameter in parameters):
            return old
        states = self.rollout_buffer.evenly_spaced(min(_FISHER_STATES, self.policy.chunk_size())).observations
        new: Evaluations = []

        def divergence() -> Any:
            new[:] = self._evaluate_batch()
            return self._divergence(old, new)

        try:
            product = fisher_vector_product(self_divergence(self.policy, states), parameters)
            natural_step(parameters, product, divergence, target_kl, self.cg_damping, self.cg_max_steps)
        except NotImplementedError as error:
            raise ValueError(
                f"The divergence of a {type(old[0][0]).__name__} has no closed form: set target_kl=None"
            ) from error
        except ValueError as error:
            raise ValueError(f"Update {self._n_updates + 1} was undone. {error}") from error
        return new

    @th.no_grad()
    def _evaluate_batch(self) -> Evaluations:
        """Evaluate the states of the batch, chunk by chunk, to bound the memory of a forward pass."""
        chunks = self.rollout_buffer.get(self.policy.chunk_size())
        evaluations = (self.policy.evaluate_observations(chunk.observations) for chunk in chunks)
        return [(copy(distribution), vf_features) for distribution, vf_features in evaluations]

    @th.no_grad()
    def _divergence(self, old: Evaluations, new: Evaluations) -> float | None:
        """Mean divergence of the new policy from the old one, None if it has no closed form."""
        try:
            return th.cat([returns.kl_divergence(a[0], b[0]) for a, b in zip(old, new, strict=True)]).mean().item()
        except NotImplementedError:
            return None

    @th.no_grad()
    def _critic_inputs(self, evaluations: Evaluations) -> tuple[th.Tensor, th.Tensor]:
        """(n_transitions, n_features) features of the baseline, and (n_transitions, action_dim) actions of the batch."""
        features = th.cat([self.policy.baseline_features(vf_features) for _, vf_features in evaluations])
        return features, th.as_tensor(self.rollout_buffer.actions, device=self.device)
