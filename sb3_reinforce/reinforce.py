"""The REINFORCE algorithm."""

import io
import math
import pathlib
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule, TensorDict
from stable_baselines3.common.utils import LinearSchedule, explained_variance
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from stable_baselines3.common.vec_env.patch_gym import _patch_env

from sb3_reinforce.baselines import LinearBaseline
from sb3_reinforce.buffers import EpisodeBufferSamples, EpisodeRolloutBuffer
from sb3_reinforce.callbacks import StepsProgressBar
from sb3_reinforce.checks import check_hyperparameters, check_learning_rate, check_model_file, check_spaces
from sb3_reinforce.policies import (
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    baseline_features,
    baseline_inputs,
    chunk_size,
    install_baseline,
)
from sb3_reinforce.rollout import EpisodeTracker, collect_episodes, environment_error, raised_within
from sb3_reinforce.sampling import nan_explained
from sb3_reinforce.vec_env import EpisodeVecEnv

SelfREINFORCE = TypeVar("SelfREINFORCE", bound="REINFORCE")


def approximate_kl(log_prob: th.Tensor, new_log_prob: th.Tensor) -> float:
    """
    Estimate of the Kullback-Leibler divergence of a new policy from the one that has acted: never negative, and of little
    variance (Schulman, 2020, "Approximating KL divergence", k3, http://joschu.net/blog/kl-approx.html).

    :param log_prob: (n_transitions,) log-probabilities of the actions under the policy that has chosen them
    :param new_log_prob: (n_transitions,) the same of the new policy
    :return: nats per transition
    """
    log_ratio = new_log_prob - log_prob
    return (th.exp(log_ratio) - 1 - log_ratio).mean().item()


def bounds_loss(means: th.Tensor, stds: th.Tensor, low: th.Tensor, high: th.Tensor) -> th.Tensor:
    """
    How far the means of Gaussian actions lie outside of the bounds to which the actions are clipped. Far out there, samples
    have the same effect as the mean, so that returns say nothing of which way to move it, and it stays where a long step has
    put it. Others who penalise this: ``bounds_loss_coef`` of rl_games (Makoviichuk & Makoviychuk, 2021,
    https://github.com/Denys88/rl_games).

    :param means: (n_transitions, n_actions)
    :param stds: (n_transitions, n_actions) standard deviations, above 0: where these are larger than half the range, samples
        reach it from further away
    :param low: (n_actions,) lower bounds, ``-inf`` for none
    :param high: (n_actions,) upper bounds, ``inf`` for none
    :return: the squared distance beyond a bound, in units of half the range or of the standard deviation, whichever is larger,
        summed over the dimensions of the action that have both bounds, mean over the transitions
    """
    excess = th.relu(means - high) + th.relu(low - means)
    return (excess / th.maximum((high - low) / 2, stds)).square().sum(dim=1).mean()


class _Default(int):
    """An integer that is a default value: it tells an argument that was left out from one that was given the same value."""


class REINFORCE(OnPolicyAlgorithm):
    """
    REINFORCE: Monte-Carlo policy gradients with a closed-form state-value baseline and normalised advantages.

    Each iteration collects whole episodes with the current policy, computes the discounted return that followed every
    action, subtracts what the baseline (fitted to earlier batches) expected in that state, normalises, and takes one gradient
    step on ``-mean(log pi(a|s) * advantage)``. By default a small term keeps exploration alive (``ent_coef`` for choices,
    ``bounds_coef`` for Gaussian actions), and a step that goes too far is shortened (``target_kl``). Then the baseline is
    fitted to the batch.

    Papers: Williams (1992), https://doi.org/10.1007/BF00992696; with a baseline: Sutton & Barto (2018), section 13.4.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy), or a subclass of these. Subclasses of
        SB3's ``ActorCriticPolicy`` work too: their critic branch is then the feature map of the baseline
    :param env: The environment to learn from (if registered in Gym, can be str; it is then made without a render mode)
    :param learning_rate: The learning rate (at least 0), it can be a function of the current progress remaining (from 1 to 0).
        By default it falls linearly to 0 over ``total_timesteps``: a rate that stays high undoes what it has learned
    :param n_steps: Steps to collect for each environment per update, at least 1: episodes are started until ``n_steps *
        n_envs`` transitions have been collected in all, and all of them are finished. Fewer make more but noisier updates
    :param gamma: Discount factor per step, in (0, 1]. Lower looks less far ahead, with less noisy returns
    :param ent_coef: Entropy coefficient for the loss calculation, at least 0. Raise it if exploration ends too early. None
        stands for 0.03 where actions are choices, one of which may otherwise die out before it is needed, and for 0 for
        Gaussian actions, whose noise is a parameter of its own
    :param bounds_coef: Coefficient of :func:`bounds_loss` for the loss calculation, at least 0: means of Gaussian actions that
        have gone beyond the bounds of the action space come back to where exploration has an effect. Raise it if a policy gets
        stuck with actions at their bounds; 0 for the plain policy gradient. Actions that are squashed, or lack one of the
        bounds, are left alone
    :param max_grad_norm: The maximum value for the gradient clipping (above 0), None for no clipping
    :param target_kl: Largest Kullback-Leibler divergence, in nats per transition (above 0), that the gradient step may take
        the policy from the one that has collected the batch: a step that goes further is shortened, its direction kept. (What
        the observation statistics then move comes on top.) It keeps a batch of few episodes from undoing what was learned;
        less is safer and slower. None for the plain step
    :param use_sde: Whether to use generalized State Dependent Exploration (gSDE) instead of action noise exploration
    :param sde_sample_freq: Sample a new noise matrix every n steps when using gSDE; -1: only at the beginning of the rollout
    :param rollout_buffer_class: Rollout buffer class to use, a subclass of
        :class:`~sb3_reinforce.buffers.EpisodeRolloutBuffer`. If ``None``, that class itself
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param normalize_advantage: Whether to give the advantages of each batch mean 0 and standard deviation 1. Without it the
        learning rate has to suit the scale of the rewards
    :param n_episodes: Episodes to collect per update over all environments, at least 1 (more if there are more
        environments), in the place of ``n_steps``. For rewards that come once an episode
    :param max_episode_steps: Episodes are cut after this many steps, at least 1, and count as timed out, with a warning unless
        the environment is known to have a time limit of its own. It keeps environments that never end from filling the
        memory; below a time limit, it makes more episodes of the same steps where a policy may dawdle, as a lander that hovers
        does
    :param baseline: What the state-value baseline is linear in: "linear" (the features), "quadratic" (and their squares),
        "random" (and fixed random tanh units of them), or None for no baseline. Richer ones reduce the variance of the
        gradient when returns are no linear function of the state. Policies that are no subclass of those here have a feature
        map of their own, their critic branch, in which both "linear" and "random" are linear
    :param baseline_memory: Weight of the batches before the latest one in the fit of the baseline, per batch, in [0, 1). Less
        follows the policy faster, more has more episodes to fit the baseline to
    :param bootstrap_timeouts: Whether the baseline's value of the last observation is added to the reward when an episode
        ends by a time limit, as SB3's algorithms do: what happens there says nothing about the state (Pardo et al., 2018,
        https://arxiv.org/abs/1712.00378). Turn it off where a time limit is part of the task, or for returns of rewards
        alone; and with ``gamma=1``, where nothing discounts the errors that the baseline then learns of itself. Without a
        baseline it changes nothing
    :param normalize_observations: Whether the policy normalises vector observations with running statistics, which are
        updated once a batch and saved with it. None stands for True with the policies here and their subclasses, and for
        False with all others, which cannot do it
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average the reported
        success rate, mean episode length, and mean reward over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for debug
        messages
    :param seed: Seed for the pseudo random generators. The actions and the environments' seeds of iteration k depend on the
        seed and k alone
    :param device: Device (cpu, cuda, ...) on which the code should be run. Setting it to auto, the code will be run on the
        GPU if possible
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
        env: GymEnv | str | None,
        learning_rate: float | Schedule = LinearSchedule(5e-3, 0.0, 1.0),
        n_steps: int | None = _Default(2000),
        gamma: float = 0.99,
        ent_coef: float | None = None,
        bounds_coef: float = 0.1,
        max_grad_norm: float | None = None,
        target_kl: float | None = 0.01,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[EpisodeRolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        n_episodes: int | None = None,
        max_episode_steps: int = 50_000,
        baseline: str | None = "random",
        baseline_memory: float = 0.85,
        bootstrap_timeouts: bool = True,
        normalize_observations: bool | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        if isinstance(n_steps, _Default):
            n_steps = None if n_episodes is not None else int(n_steps)
        super().__init__(
            policy,
            None,  # type: ignore[arg-type]  # see _attach_env
            learning_rate=learning_rate,
            n_steps=n_steps,  # type: ignore[arg-type]
            gamma=gamma,
            gae_lambda=1.0,
            ent_coef=ent_coef,  # type: ignore[arg-type]
            vf_coef=0.0,
            max_grad_norm=max_grad_norm,  # type: ignore[arg-type]
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
        self.bounds_coef = bounds_coef
        self.target_kl = target_kl
        self.normalize_advantage = normalize_advantage
        self.n_episodes = n_episodes
        self.max_episode_steps = max_episode_steps
        self.baseline = baseline
        self.baseline_memory = baseline_memory
        self.bootstrap_timeouts = bootstrap_timeouts
        is_own = issubclass(self.policy_class, MlpPolicy)
        self.normalize_observations = is_own if normalize_observations is None else normalize_observations

        if env is not None:
            self._attach_env(env, policy)
        elif _init_setup_model:
            raise ValueError("env=None has no spaces to make a policy for: give an environment, or _init_setup_model=False")
        if _init_setup_model:
            self._setup_model()

    def _attach_env(self, env: GymEnv | str, policy: str | type[BasePolicy]) -> None:
        """Wrap and check the environment. SB3's own way refuses actions without bounds, which a Gaussian does not need."""
        self.env = self._wrap_env(env, self.verbose)
        self.observation_space = self.env.observation_space
        self.action_space = self.env.action_space
        self.n_envs = self.env.num_envs
        self._vec_normalize_env = unwrap_vec_normalize(self.env)
        check_spaces(self, policy)

    @staticmethod
    def _wrap_env(env: GymEnv | str, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """
        As SB3's, but what is not a ``VecEnv`` becomes an :class:`~sb3_reinforce.vec_env.EpisodeVecEnv`, and an environment
        may be named by a string. It is made without a render mode then: with one, as SB3 does it, many draw every frame.
        """
        if isinstance(env, str):
            env = gym.make(env)
        if not isinstance(env, VecEnv):
            single_env = _patch_env(env)
            if monitor_wrapper and not is_wrapped(single_env, Monitor):
                if verbose >= 1:
                    print("Wrapping the env with a `Monitor` wrapper")
                single_env = Monitor(single_env)
            if verbose >= 1:
                print("Wrapping the env in a DummyVecEnv (an EpisodeVecEnv).")
            env = EpisodeVecEnv([lambda: single_env])
        return OnPolicyAlgorithm._wrap_env(env, verbose)

    def _setup_model(self) -> None:
        if self.ent_coef is None:
            self.ent_coef = 0.0 if isinstance(self.action_space, spaces.Box) else 0.03
        check_hyperparameters(self)
        self._setup_lr_schedule()
        check_learning_rate(self.lr_schedule(1.0), 1.0)
        self.set_random_seed(self.seed)
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
        own_kwargs: dict[str, Any] = dict(
            baseline=self.baseline,
            baseline_memory=self.baseline_memory,
            normalize_observations=self.normalize_observations,
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
            install_baseline(policy, self.baseline, self.baseline_memory)
        self.policy = policy.to(self.device)
        self._maybe_recommend_cpu("MlpPolicy")

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed the generators of Python, NumPy, PyTorch, the action space and the environments, and fix the noise of all
        iterations to come.

        :param seed: None leaves everything as it is
        """
        super().set_random_seed(seed)
        if seed is not None:
            self.seed = seed

    def _rollout_rng(self) -> np.random.Generator:
        """The randomness of the next rollout: a function of the seed and the number of updates, so that it can be resumed."""
        if self.seed is not None:
            return np.random.default_rng((self.seed, self._n_updates))
        # Without a seed, follow NumPy's global generator as other SB3 algorithms follow PyTorch's
        return np.random.default_rng(np.random.randint(2**32, size=4, dtype=np.uint32))

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
        episodes = EpisodeTracker(
            env.num_envs,
            min_transitions=(n_rollout_steps or 0) * env.num_envs,
            min_episodes=self.n_episodes or 0,
            max_episode_steps=self.max_episode_steps,
        )
        rng = self._rollout_rng()
        self._num_timesteps_before_rollout = self.num_timesteps
        if not collect_episodes(self, env, callback, rollout_buffer, rng, episodes, self.bootstrap_timeouts):
            return False

        values = rollout_buffer.values
        if self.baseline is None:
            values = np.zeros(len(rollout_buffer.rewards))
        elif values is None:
            features = th.as_tensor(self._baseline_features(), device=self.device)
            values = self.policy.value_net(features).cpu().numpy().flatten()
        rollout_buffer.compute_returns_and_advantage(values)

        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def train(self) -> None:
        """
        Take one gradient step on the whole batch, no longer than ``target_kl`` allows, then refit the baseline to it.

        :raises ValueError: when the gradient, or the policy after the step, is not finite: policy and optimiser are then as
            they were before
        """
        advantage_std = self.rollout_buffer.advantages.std()
        if self.normalize_advantage:
            self.rollout_buffer.normalize_advantages()
        before = deepcopy(self.get_parameters())
        try:
            # Switch to train mode (this affects batch norm / dropout)
            self.policy.set_training_mode(True)
            self._update_learning_rate(self.policy.optimizer)
            losses, log_prob, grad_norm = self._compute_gradient()
            # A look at the policy must not change the statistics of batch norm
            self.policy.set_training_mode(False)
            start = [parameter.detach().clone() for parameter in self.policy.parameters()]
            self.policy.optimizer.step()
            new_log_prob, features = self._look_at_policy()
            kl = approximate_kl(log_prob, new_log_prob)
            if self.target_kl is not None and not kl <= self.target_kl:
                kl, features = self._shorten_step(start, new_log_prob, features, self.target_kl)
        except ValueError:
            super().set_parameters(before)  # type: ignore[arg-type]
            raise
        self._n_updates += 1
        self._refit_baseline(features)

        values, returns = self.rollout_buffer.values, self.rollout_buffer.returns
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name, loss in losses.items():
            self.logger.record(f"train/{name}", loss)
        self.logger.record("train/grad_norm", grad_norm)
        self.logger.record("train/approx_kl", kl)
        self.logger.record("train/advantage_std", advantage_std)
        self.logger.record("train/explained_variance", explained_variance(values, returns))
        self.logger.record("train/baseline_mse", np.mean((returns - values) ** 2))
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", th.exp(self.policy.log_std).mean().item())

    def _chunks(self) -> Iterator[tuple[EpisodeBufferSamples, th.Tensor]]:
        """The batch, as much of it at a time as the policy should be shown, with actions as the policy evaluates them."""
        for batch in self.rollout_buffer.chunks(chunk_size(self.policy)):
            yield batch, batch.actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else batch.actions

    def _compute_gradient(self) -> tuple[dict[str, float], th.Tensor, float]:
        """
        Leave the gradient of the loss over the whole batch, clipped if asked for, in the parameters.

        :return: the parts of the loss without their coefficients, log-probabilities of the actions (n_transitions,), norm of
            the gradient before clipping
        :raises ValueError: if it is not finite
        """
        losses: dict[str, float] = defaultdict(float)
        log_probs = []
        self.policy.optimizer.zero_grad()
        is_clipped = isinstance(self.action_space, spaces.Box) and not self.policy.squash_output
        for batch, actions in self._chunks():
            # What evaluating the actions does not make anew is not what they were evaluated with
            self.policy.action_dist.distribution = None  # type: ignore[assignment]
            with nan_explained():
                _, log_prob, entropy = self.policy.evaluate_actions(batch.observations, actions)
            share = len(log_prob) / len(self.rollout_buffer.rewards)
            parts = dict(
                policy_gradient_loss=-(batch.advantages * log_prob).mean(),
                # Approximate the entropy when it has no analytical form
                entropy_loss=log_prob.mean() if entropy is None else -entropy.mean(),
            )
            loss = parts["policy_gradient_loss"] + self.ent_coef * parts["entropy_loss"]
            gaussian = self.policy.action_dist.distribution
            if is_clipped and isinstance(gaussian, th.distributions.Normal):
                low, high = (
                    th.as_tensor(bound.flatten()).to(gaussian.mean)
                    for bound in (self.action_space.low, self.action_space.high)  # type: ignore[attr-defined]
                )
                parts["bounds_loss"] = bounds_loss(gaussian.mean, gaussian.stddev.detach(), low, high)
                if self.bounds_coef > 0:
                    loss = loss + self.bounds_coef * parts["bounds_loss"]
            (share * loss).backward()
            for name, part in parts.items():
                losses[name] += share * part.item()
            log_probs.append(log_prob.detach())
        max_norm = math.inf if self.max_grad_norm is None else self.max_grad_norm
        grad_norm = th.nn.utils.clip_grad_norm_(self.policy.parameters(), max_norm).item()
        if not math.isfinite(grad_norm):
            raise ValueError(
                f"The gradient of update {self._n_updates + 1} is not finite (losses {dict(losses)}): the step was not taken. "
                "Rewards, observations or coefficients may be too large: scale them down"
            )
        return losses, th.cat(log_probs), grad_norm

    def _look_at_policy(self) -> tuple[th.Tensor, np.ndarray | None]:
        """
        :return: log-probabilities (n_transitions,) of the batch's actions, and what the baseline is linear in (n_transitions,
            n_features) if the policy has looked at it on the way
        :raises ValueError: if a log-probability is not finite
        """
        with th.no_grad(), baseline_inputs(self.policy) as features:
            try:
                with nan_explained():
                    log_prob = th.cat([self.policy.evaluate_actions(b.observations, a)[1] for b, a in self._chunks()])
                if not th.isfinite(log_prob).all():
                    raise ValueError("The policy's output is not finite: its own actions have log-probabilities that are not")
            except ValueError as error:
                raise ValueError(f"Update {self._n_updates + 1} was undone: lower the learning rate. {error}") from error
        return log_prob, np.concatenate(features) if sum(map(len, features)) == len(log_prob) else None

    def _shorten_step(
        self, start: list[th.Tensor], new_log_prob: th.Tensor, features: np.ndarray | None, target_kl: float
    ) -> tuple[float, np.ndarray | None]:
        """
        Go back towards the parameters before the step until it is no longer than it may be.

        :param start: the parameters of the policy before the step
        :param new_log_prob: what :meth:`_look_at_policy` has returned after it
        :param features: the same
        :param target_kl: largest divergence, in nats per transition
        :return: the divergence that is left, and features as :meth:`_look_at_policy` returns them
        """
        end = [parameter.detach().clone() for parameter in self.policy.parameters()]

        def take(share: float) -> None:
            with th.no_grad():
                for parameter, old, new in zip(self.policy.parameters(), start, end, strict=True):
                    parameter.copy_(th.lerp(old, new, share))

        # Once more in evaluation mode: what dropout or batch norm do in training is no part of the step
        take(0.0)
        log_prob, _ = self._look_at_policy()
        share = 1.0
        take(share)
        while not (kl := approximate_kl(log_prob, new_log_prob)) <= target_kl and share > 1e-6:
            # The divergence of short steps is quadratic in their length, that of long ones may be anything
            share *= min(max(math.sqrt(target_kl / kl), 0.5), 0.9) if math.isfinite(kl) else 0.5
            take(share)
            new_log_prob, features = self._look_at_policy()
        return kl, features

    def _refit_baseline(self, features: np.ndarray | None) -> None:
        """
        Bring the observation statistics up to date, then fit the baseline to the batch that has been learned from, with the
        statistics and the feature extractor that it will be used with.

        :param features: what it is linear in, with the new feature extractor; None if that is not known
        """
        if self.normalize_observations and self.policy.observation_normalizer.keys:  # type: ignore[union-attr]
            self.policy.observation_normalizer.update(self.rollout_buffer.observations)  # type: ignore[union-attr,operator]
            features = None
        if self.baseline is not None:
            assert isinstance(self.policy.value_net, LinearBaseline)
            self.policy.value_net.fit(self._baseline_features() if features is None else features, self.rollout_buffer.returns)

    def _baseline_features(self) -> np.ndarray:
        """What the baseline is linear in, for all transitions of the batch."""
        return baseline_features(self.policy, self.rollout_buffer.observation_chunks(chunk_size(self.policy)))

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        # Were the steps of the latest batch counted, as they are by SB3, a schedule would be past its beginning for the first
        # update, and at its end for the last one, which with whole episodes may be the only one
        super()._update_current_progress_remaining(self._num_timesteps_before_rollout, total_timesteps)

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        check_learning_rate(self.lr_schedule(self._current_progress_remaining), self._current_progress_remaining)
        super()._update_learning_rate(optimizers)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self.env is None:
            raise ValueError("The model has no environment to learn from: give one to load() or set_env()")
        try:
            total_timesteps, callback = super()._setup_learn(*args, **kwargs)
        except Exception as error:
            if raised_within(self.env, error):
                raise environment_error(self.env, error, "in reset()") from error
            raise
        if self.num_timesteps > 0:
            # Others, an evaluation for instance, may have stepped the environments since the last rollout
            self._last_episode_starts = np.zeros(self.n_envs, dtype=bool)
        return total_timesteps, callback

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if progress_bar:
            given = callback if isinstance(callback, list) else [callback]
            callback = [*(c if isinstance(c, BaseCallback) else ConvertCallback(c) for c in given), StepsProgressBar()]
        return super()._init_callback(callback)

    def learn(
        self: SelfREINFORCE,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "REINFORCE",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfREINFORCE:
        return super().learn(
            total_timesteps=total_timesteps,
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters from a zip-file or a nested dictionary, see SB3. If they do not fit, nothing is changed.

        :param load_path_or_dict: Location of the saved data (path or file-like), or a dictionary of state dictionaries
        :param exact_match: If True, the given parameters should include parameters for each module and each of their
            parameters, otherwise raises an Exception
        :param device: Device on which the code should run
        """
        before = deepcopy(self.get_parameters())
        try:
            super().set_parameters(load_path_or_dict, exact_match, device)
        except Exception:
            super().set_parameters(before)  # type: ignore[arg-type]
            raise

    @classmethod
    def load(
        cls: type[SelfREINFORCE],
        path: str | pathlib.Path | io.BufferedIOBase,
        *args: Any,
        **kwargs: Any,
    ) -> SelfREINFORCE:
        """
        Load the model from a zip-file, see SB3's ``BaseAlgorithm.load``.

        :param path: path to the file (or a file-like) where to load the agent from
        :param args: as in SB3
        :param kwargs: as in SB3
        :return: new model instance with loaded parameters
        :raises ValueError: if the file is damaged or holds a model of another algorithm, if the spaces of the environment
            are not those of the model, or if an argument asks for a baseline that is not the model's
        """
        check_model_file(path, kwargs)
        return super().load(path, *args, **kwargs)
