"""Validation of the hyperparameters of REINFORCE."""

import warnings
from typing import Any, get_args

from sb3_reinforce.baselines import BASELINES
from sb3_reinforce.episodes.buffer import EpisodeRolloutBuffer
from sb3_reinforce.episodes.checks import check_count, is_integer, is_real
from sb3_reinforce.policies import MlpPolicy
from sb3_reinforce.returns import AdvantageName

DEFAULT_RATE = 1e-3  # only steps of the optimizer use it


def check_hyperparameters(model: Any) -> None:
    """Raise a ValueError that names the first hyperparameter of a model that is out of its range, and its value."""

    def check(name: str, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise ValueError(f"{name.lstrip('_')} must be {expected}, got {name.lstrip('_')}={getattr(model, name)!r}")

    if model.n_steps is None and model.n_episodes is None:
        raise ValueError("n_steps and n_episodes are both None: one of them must be given, the size of a batch")
    for name in ("n_steps", "n_episodes", "max_episode_steps"):
        check_count(name, getattr(model, name))
    check("_stats_window_size", is_integer(model._stats_window_size), "an integer of at least 1")
    check("gamma", is_real(model.gamma) and 0 < model.gamma <= 1, "in (0, 1]")
    check("ent_coef", is_real(model.ent_coef, minimum=0), "finite and at least 0")
    rate, target_kl = model.learning_rate, model.target_kl
    check("learning_rate", callable(rate) or is_real(rate, minimum=0), "a schedule, or finite and at least 0")
    unused = [] if rate == DEFAULT_RATE else ["learning_rate"]
    unused += [name for name in ("optimizer_class", "optimizer_kwargs") if name in model.policy_kwargs]
    if target_kl is not None and unused:
        warnings.warn(f"{' and '.join(unused)} of no effect: target_kl sets steps, unless it is None", stacklevel=4)
    is_step = target_kl in (None, "auto") or callable(target_kl) or (is_real(target_kl) and target_kl > 0)
    check("target_kl", is_step, "'auto', a schedule, or finite and above 0, or None for the optimizer's step")
    check("cg_max_steps", is_integer(model.cg_max_steps), "an integer of at least 1")
    is_damping = model.cg_damping == "auto" or (is_real(model.cg_damping) and model.cg_damping > 0)
    check("cg_damping", is_damping, "'auto', or finite and above 0")
    check("baseline", model.baseline is None or model.baseline in BASELINES, f"None or one of {sorted(BASELINES)}")
    check("advantage", model.advantage in get_args(AdvantageName), f"one of {sorted(get_args(AdvantageName))}")
    if model.baseline is None:
        check("advantage", model.advantage == "monte_carlo", "'monte_carlo' with baseline=None: the others need a critic")
    check("baseline_memory", is_real(model.baseline_memory, 0) and model.baseline_memory < 1, "in [0, 1)")
    allowed = {None: set(), "random_features": {"ridge", "n_units", "time"}}.get(model.baseline, {"ridge", "time"})
    check("baseline_kwargs", model.baseline_kwargs.keys() <= allowed, f"a dictionary of {sorted(allowed)} with this baseline")
    is_valid = is_real(model.baseline_kwargs.get("ridge", 0), 0) and is_integer(model.baseline_kwargs.get("n_units", 1))
    check("baseline_kwargs", is_valid, "a finite ridge of at least 0, and an integer n_units of at least 1")
    is_own = not model.normalize_observations or issubclass(model.policy_class, MlpPolicy)
    check("normalize_observations", is_own, "False, except with the policies of sb3_reinforce and their subclasses")
    buffer = model.rollout_buffer_class
    is_buffer = buffer is None or (isinstance(buffer, type) and issubclass(buffer, EpisodeRolloutBuffer))
    check("rollout_buffer_class", is_buffer, "a subclass of sb3_reinforce.EpisodeRolloutBuffer")
