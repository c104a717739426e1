"""The REINFORCE algorithm."""

import math
import sys
import warnings
from collections import defaultdict
from concurrent.futures import Executor
from copy import copy
from typing import Any, ClassVar, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import explained_variance

from sb3_reinforce import natural_gradient, returns
from sb3_reinforce.checks import DEFAULT_RATE, check_hyperparameters
from sb3_reinforce.episodes.acting import overrides
from sb3_reinforce.episodes.algorithm import EpisodicAlgorithm
from sb3_reinforce.episodes.buffer import EpisodeRolloutBuffer
from sb3_reinforce.episodes.checks import check_scheduled
from sb3_reinforce.episodes.schedule import torch_seeded_from, update_rng
from sb3_reinforce.episodes.vec_env import EnvSource
from sb3_reinforce.policies import BaselineName, BaselinePolicy, CnnPolicy, MlpPolicy, MultiInputPolicy, flatten, with_baseline

_MIN_STATES = 256  # of the Fisher matrix, even if fewer fit in a forward pass
_MAX_PARAMETERS = 20_000_000  # of a policy whose batches are halved, because a Krylov space takes memory
#: Action distributions and the critic's extracted features in the states of a batch, by chunk
Evaluations = list[tuple[Distribution, th.Tensor]]


class REINFORCE(EpisodicAlgorithm):
    """
    REINFORCE: Monte-Carlo policy gradients with a closed-form state-value baseline and normalized advantages.

    Each iteration collects whole episodes with the current policy, computes discounted returns, subtracts the baseline (fitted
    to earlier batches), normalizes the result, and takes one step on ``-mean(log pi(a|s) * advantage)``, along the natural
    gradient; the batches choose how natural it is, and how long. Then the baseline is fitted to the batch.

    Paper: Williams (1992), https://doi.org/10.1007/BF00992696; with a baseline: Sutton & Barto (2018), section 13.4. Natural
    gradient: Kakade (2001); Peters & Schaal (2008); Duan et al. (2016, TNPG), https://arxiv.org/abs/1604.06778

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy), or a subclass of ``ActorCriticPolicy``
    :param env: The environment to learn from: an id, a function that makes it, an environment, or a ``VecEnv``. All run in an
        :class:`~sb3_reinforce.EpisodeVecEnv`, except a ``VecEnv`` that is not a plain ``DummyVecEnv``
    :param learning_rate: The learning rate of the optimizer with ``target_kl=None``, at least 0, or a schedule
    :param n_steps: Minimum number of steps to run for each environment per update, at least 1, or None. Episodes are finished
    :param gamma: Discount factor, in (0, 1]. Lower values reduce the variance of returns, and ignore distant rewards
    :param ent_coef: Entropy coefficient for the loss calculation, at least 0. Raise it if exploration ends too early
    :param target_kl: Kullback-Leibler divergence of the new policy from the old one, in nats per transition, summed over
        action dimensions: a number above 0, a function of the current progress remaining, "auto" for 0.0125, which falls
        unless the gradient has a signal, or None for the optimizer's step. With a constant, the policy never settles
    :param cg_max_steps: Maximum number of products with the Fisher matrix per gradient, at least 1
    :param cg_damping: Damping of the Fisher matrix: a number above 0 (small values give the natural gradient, large values the
        plain one), or "auto" for the one of ``DAMPINGS`` whose steps the other half of a batch has confirmed best
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE) instead of action noise exploration
    :param sde_sample_freq: Sample a new noise matrix every n steps of an episode when using gSDE. -1: only at its beginning
    :param rollout_buffer_class: Rollout buffer class to use, a subclass of :class:`~sb3_reinforce.EpisodeRolloutBuffer`
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param normalize_advantage: Whether to normalize the advantages of each batch
    :param n_episodes: Minimum number of episodes per update, over all environments, at least 1, or None
    :param max_episode_steps: Number of steps of a ``TimeLimit`` around the environment, at least 1, or None. A low limit gives
        more episodes per step if a policy wastes time. Not for a ``VecEnv``
    :param advantage: Advantage function: "monte_carlo" is REINFORCE; "q", "advantage" and "td" are actor-critics, for
        comparison. See :mod:`sb3_reinforce.returns` for formulas and sources
    :param baseline: Features of the state-value baseline: "linear" (observations), "random_features" (observations, time since
        the start of the episode, and fixed random tanh units of these), or None for no baseline
    :param baseline_memory: Weight of earlier batches in the fit of the baseline, relative to the next batch, in [0, 1). Lower
        values follow the policy faster, higher values fit more episodes
    :param baseline_kwargs: "ridge", at least 0 (default: 0 for "linear", 0.2 for "random_features" and learned features; raise
        it if the baseline fits noise), "n_units", the number of random units (default: 128), and "time"
    :param bootstrap_timeouts: Whether to add the baseline's value of the last observation to the reward at a time limit, as in
        SB3 (Pardo et al., 2018, https://arxiv.org/abs/1712.00378). By default, nothing follows the limit: enable it if the
        task continues there
    :param seed_episodes: Whether each ``reset()`` gets the seed of its episode, if there is a seed. False for the first one
        alone, as in SB3: for environments that begin a list of tasks anew with each seed, or take long to reset with one.
        Results are then not exactly reproducible
    :param normalize_observations: Whether the policy normalizes vector observations with running statistics, which it saves.
        None: only with the policies of this package and their subclasses
    :param stats_window_size: Number of episodes to average the reported success rate, episode length, and reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for debug
    :param seed: Seed for the pseudo random generators. If None, environments are not seeded, and ``run_seed`` (for the weights
        and the action noise) is drawn from NumPy's global generator
    :param workers: Where episodes run: None for this process, a number of processes (extra ``workers``), or an ``Executor``,
        e.g. of a cluster. The environment must then be an id, an ``EnvSpec`` or a function. Results do not depend on it
    :param device: Device (cpu, cuda, ...) on which the code should be run, "auto" for the GPU if possible
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    :raises ValueError: if an argument is out of its range, or a space is not supported (TypeError: unknown arguments)
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: BaselinePolicy
    _fixed_arguments = ("advantage", "baseline", "baseline_memory", "baseline_kwargs", "normalize_observations")
    _update_state = ("damping_scores",)

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: EnvSource | None,
        learning_rate: float | Schedule = DEFAULT_RATE,
        n_steps: int | None = 1000,
        gamma: float = 0.99,
        ent_coef: float = 0.0,
        target_kl: float | Schedule | Literal["auto"] | None = "auto",
        cg_max_steps: int = 15,
        cg_damping: float | Literal["auto"] = "auto",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[EpisodeRolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        n_episodes: int | None = 5,
        max_episode_steps: int | None = None,
        advantage: returns.AdvantageName = "monte_carlo",
        baseline: BaselineName | None = "random_features",
        baseline_memory: float = 0.6,
        baseline_kwargs: dict[str, Any] | None = None,
        bootstrap_timeouts: bool = False,
        seed_episodes: bool = True,
        normalize_observations: bool | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        workers: int | Executor | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        **unsupported: Any,
    ):
        if unsupported:
            names = ", ".join(map(repr, unsupported))
            raise TypeError(f"REINFORCE has no argument {names}. docs/migration.md maps those of A2C, PPO and TRPO")
        kwargs: dict[str, Any] = dict(gamma=gamma, ent_coef=ent_coef, use_sde=use_sde, sde_sample_freq=sde_sample_freq)
        kwargs |= dict(rollout_buffer_class=rollout_buffer_class, rollout_buffer_kwargs=rollout_buffer_kwargs, workers=workers)
        kwargs |= dict(stats_window_size=stats_window_size, tensorboard_log=tensorboard_log, policy_kwargs=policy_kwargs)
        kwargs |= dict(bootstrap_timeouts=bootstrap_timeouts, seed_episodes=seed_episodes, verbose=verbose, device=device)
        super().__init__(policy, env, learning_rate, n_steps, n_episodes, max_episode_steps, seed=seed, **kwargs)
        self.target_kl, self.cg_max_steps, self.cg_damping = target_kl, cg_max_steps, cg_damping
        #: Running means of :func:`~sb3_reinforce.natural_gradient.cross_validate`
        self.damping_scores = np.zeros((2, len(natural_gradient.DAMPINGS)))
        self.normalize_advantage = normalize_advantage
        self.advantage, self.baseline, self.baseline_memory = advantage, baseline, baseline_memory
        self.baseline_kwargs = baseline_kwargs or {}
        if normalize_observations is None:
            normalize_observations = issubclass(self.policy_class, MlpPolicy)
        self.normalize_observations = normalize_observations
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
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
            gamma=self.gamma,
            normalize_observations=self.normalize_observations,
            action_values=self.advantage in ("q", "advantage"),
            **self.policy_kwargs,
        )

    def _compute_advantages(self) -> None:
        buffer, policy = self.rollout_buffer, self.policy
        buffer.returns = returns.discounted_returns(buffer.rewards, buffer.episode_starts, self.gamma)
        # The critics are fitted to earlier batches
        buffer.evaluations = self._evaluate_batch()
        features, actions = self._critic_inputs(buffer.evaluations)
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
        """Take one step on the whole batch, then fit the critics to it. An error leaves the model as it was before."""
        buffer, policy = self.rollout_buffer, self.policy
        self.logger.record("train/n_updates", self._n_updates + 1, exclude="tensorboard")
        self.logger.record("train/advantage_std", float(buffer.advantages.std()))
        size = np.ptp(buffer.advantages) if self.normalize_advantage else np.abs(buffer.advantages).max()
        if size <= 1e-6 * np.abs(buffer.returns).max():
            buffer.advantages = np.zeros_like(buffer.advantages)
            if self._n_updates > 0:
                warnings.warn("A batch taught nothing: its advantages are equal. If this repeats, raise n_steps", stacklevel=2)
        elif self.normalize_advantage:
            buffer.advantages = returns.batch_normalize(buffer.advantages)

        with self._all_or_nothing():
            old = buffer.evaluations
            try:
                policy.update_statistics(buffer.observations)
                normalized = old if policy.observation_normalizer is None else self._evaluate_batch()
                gradients = self._compute_gradient()
                new = self._optimizer_step() if self.target_kl is None else self._natural_step(normalized, gradients)
                if (divergence := self._divergence(old, new)) is not None and not math.isfinite(divergence):
                    raise ValueError("The divergence of the new policy from the old one is infinite: take shorter steps")
            except ValueError as error:
                raise ValueError(f"Update {self._n_updates + 1} was undone. {error}") from error
            if divergence is not None:
                self.logger.record("train/kl_divergence_loss", divergence)
            if hasattr(policy, "log_std"):
                # float32 cannot tell actions apart that are closer, or the mean from 0 if they are farther apart
                policy.log_std.data.clamp_(*(sign * math.log(np.finfo(np.float32).eps) for sign in (1, -1)))
                self.logger.record("train/std", th.exp(policy.log_std).mean().item())
            features, actions = self._critic_inputs(new)
            if self.baseline is not None:
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

    def _parts(self) -> list[np.ndarray | None]:
        """Rows of every other episode and of the rest, if the batch sets damping or length, else None for all rows."""
        numbers = np.cumsum(self.rollout_buffer.episode_starts)
        is_large = sum(parameter.numel() for parameter in self.policy.trained_parameters()) > _MAX_PARAMETERS
        is_given = self.target_kl is None or "auto" not in (self.target_kl, self.cg_damping)
        # Batch normalization needs the whole batch
        if is_given or is_large or numbers[-1] == 1 or self.policy.chunk_size() == sys.maxsize:
            return [None]
        return [np.flatnonzero(numbers % 2 == 1), np.flatnonzero(numbers % 2 == 0)]

    @th.enable_grad()
    def _compute_gradient(self) -> list[th.Tensor]:
        """Compute the gradients of each part of the loss, in train mode (this affects batch norm / dropout)."""
        policy, buffer, is_discrete = self.policy, self.rollout_buffer, isinstance(self.action_space, spaces.Discrete)
        losses: dict[str, float] = defaultdict(float)
        gradients = []
        policy.set_training_mode(True)
        with torch_seeded_from(update_rng(self.run_seed, self._n_updates), self.device):
            for rows in self._parts():
                policy.zero_grad()
                for batch in buffer.get(policy.chunk_size(), rows):
                    actions = batch.actions.long().flatten() if is_discrete else batch.actions
                    if overrides(policy, "evaluate_actions"):
                        _, log_prob, entropy = policy.evaluate_actions(batch.observations, actions)
                    else:
                        distribution, _ = policy.evaluate_observations(batch.observations)
                        space = None if self.target_kl is None else self.action_space  # None: the textbook's algorithm
                        log_prob, entropy = returns.log_prob(distribution, actions, space), distribution.entropy()
                    policy_gradient_loss = returns.policy_gradient_loss(log_prob, batch.advantages)
                    entropy_loss = returns.entropy_loss(log_prob, entropy)
                    loss = policy_gradient_loss + self.ent_coef * entropy_loss
                    (loss * len(actions) / buffer.size()).backward()
                    losses["policy_gradient_loss"] += policy_gradient_loss.item() * len(actions) / buffer.size()
                    losses["entropy_loss"] += entropy_loss.item() * len(actions) / buffer.size()
                gradients.append(flatten(th.zeros_like(p) if p.grad is None else p.grad for p in policy.trained_parameters()))
        policy.set_training_mode(False)
        losses["grad_norm"] = sum(gradients).norm().item()  # type: ignore[union-attr]
        if not math.isfinite(losses["grad_norm"]):
            raise ValueError("The gradient is not finite: scale down rewards, observations or coefficients")
        for name, value in losses.items():
            self.logger.record(f"train/{name}", value)
        return gradients

    def _optimizer_step(self) -> Evaluations:
        """Take a step of the optimizer. Return the evaluations of the new policy."""
        check_scheduled("learning_rate", self.lr_schedule(self._current_progress_remaining), self._current_progress_remaining)
        self._update_learning_rate(self.policy.optimizer)
        self.policy.optimizer.step()
        return self._evaluate_batch()

    def _natural_step(self, old: Evaluations, gradients: list[th.Tensor]) -> Evaluations:
        """Take a step along the natural gradient. Return the evaluations of the new policy."""
        target_kl: Any = self.target_kl(self._current_progress_remaining) if callable(self.target_kl) else self.target_kl
        parameters, new = self.policy.trained_parameters(), Evaluations()
        if target_kl == 0 or not self.rollout_buffer.advantages.any() or not any(gradient.any() for gradient in gradients):
            return self._evaluate_batch()
        rows, counts = self.rollout_buffer.sample_states(max(_MIN_STATES, self.policy.chunk_size()))
        states = next(self.rollout_buffer.get(None, rows)).observations
        dampings = natural_gradient.DAMPINGS if self.cg_damping == "auto" else np.array([self.cg_damping])
        scores = self.damping_scores if self.damping_scores.shape[1] == len(dampings) else np.zeros((2, len(dampings)))

        def divergence() -> Any:
            new[:] = self._evaluate_batch()
            return self._divergence(old, new)

        try:
            product = natural_gradient.fisher_vector_product(self.policy, states, counts)
            found = natural_gradient.natural_direction(product, gradients, dampings, scores, self.cg_max_steps)
        except RuntimeError as error:
            if not isinstance(error, NotImplementedError) and "derivative" not in str(error):
                raise
            raise ValueError(f"The policy has no natural gradient ({error}): set target_kl=None") from error
        direction, chosen, self.damping_scores = found
        signal = float(self.damping_scores[0, chosen] / max(self.damping_scores[1, chosen], 1e-30))
        if len(gradients) > 1:
            self.logger.record("train/cg_damping", float(dampings[chosen]))
            self.logger.record("train/gradient_signal", signal)
        if target_kl == "auto":
            target_kl = natural_gradient.divergence_of_signal(signal, self._n_iterations)
        check_scheduled("target_kl", target_kl, self._current_progress_remaining)
        natural_gradient.natural_step(parameters, direction, product, divergence, float(target_kl))
        return new or self._evaluate_batch()

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
        n_steps = th.as_tensor(returns.steps_since_episode_start(self.rollout_buffer.episode_starts), device=self.device)
        features = self.policy.baseline_features(th.cat([vf_features for _, vf_features in evaluations]), n_steps)
        return features, th.as_tensor(self.rollout_buffer.actions, device=self.device)
