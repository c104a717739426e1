"""What is refused, and in what words; spaces and damaged files are in tests/integration."""

import base64
import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes.files import FILE_FORMAT, read_model_file
from tests.envs import ScriptedEnv

# Arguments -------------------------------------------------------------------------------------------------------------------


def test_recurrent_policies_are_refused():
    with pytest.raises(ValueError, match="not recurrent"):
        REINFORCE(RecurrentActorCriticPolicy, ScriptedEnv([4]))


def test_no_environment_is_refused_unless_the_model_is_set_up_later():
    with pytest.raises(ValueError, match="env=None has no spaces"):
        REINFORCE("MlpPolicy", None)
    REINFORCE("MlpPolicy", None, _init_setup_model=False)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("n_steps", value) for value in (0, -1, 2.5, "3", True)],
        *[("n_episodes", value) for value in (0, -3, 1.5, True)],
        *[("gamma", value) for value in (0.0, -0.1, 1.1, np.nan, None)],
        *[("ent_coef", value) for value in (-0.1, np.nan, np.inf, None)],
        *[("target_kl", value) for value in (0.0, -1.0, np.nan, np.inf, "lin_1e-2")],
        *[("cg_max_steps", value) for value in (0, -1, 2.5, None, True)],
        *[("cg_damping", value) for value in (0.0, -1.0, np.nan, np.inf, None)],
        *[("learning_rate", value) for value in (-1e-3, np.nan, np.inf, "lin_5e-3")],
        *[("max_episode_steps", value) for value in (0, 1.5)],
        *[("baseline_memory", value) for value in (-0.1, 1.0, np.nan, None)],
        *[("baseline", value) for value in ("cubic", "random", 3)],
        *[("baseline_kwargs", dict(ridge=value)) for value in (-1.0, np.nan, np.inf, "1", None)],
        *[("baseline_kwargs", dict(n_units=value)) for value in (0, -1, 2.5, None)],
        *[("advantage", value) for value in ("TD", "gae", "", "monte carlo", None, 1, True)],
        *[("baseline_kwargs", value) for value in (dict(units=3), dict(ridge=1.0, memory=0.5))],
        ("stats_window_size", 0),
        ("rollout_buffer_class", RolloutBuffer),
    ],
)
def test_arguments_out_of_range_are_refused_by_name_and_value(argument: str, value: Any):
    kwargs = dict(n_episodes=None) | {argument: value}
    with pytest.raises(ValueError, match=rf"{argument}.*{re.escape(str(value))}"):
        REINFORCE("MlpPolicy", ScriptedEnv([4]), **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", ["MlpPolicy", ActorCriticPolicy])
@pytest.mark.parametrize("advantage", ["monte_carlo", "q", "advantage", "td"])
def test_without_a_baseline_there_is_no_critic_to_learn_from(policy: Any, advantage: Any):
    """Which leaves the returns themselves."""
    kwargs: dict[str, Any] = dict(n_steps=8, advantage=advantage)
    if advantage == "monte_carlo":
        assert REINFORCE(policy, ScriptedEnv([4]), baseline=None, **kwargs).learn(1)._n_updates == 1
    else:
        message = f"advantage must be 'monte_carlo' with baseline=None: .* got advantage='{advantage}'"
        with pytest.raises(ValueError, match=message):
            REINFORCE(policy, ScriptedEnv([4]), baseline=None, **kwargs)
    assert REINFORCE(policy, ScriptedEnv([4]), baseline="linear", **kwargs).learn(1)._n_updates == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_of_numpy_are_arguments_as_well(dtype: type):
    kwargs = dict(target_kl=dtype(0.01), cg_damping=dtype(0.1), cg_max_steps=np.int64(5), ent_coef=dtype(0.1))
    model = REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=8, **kwargs)
    assert model.learn(1)._n_updates == 1


@pytest.mark.parametrize(
    ("baseline", "kwargs"),
    [
        (None, dict(ridge=1.0)),
        ("linear", dict(n_units=5)),
        ("quadratic", dict(n_units=5)),
    ],
)
def test_baseline_kwargs_of_another_baseline_are_refused(baseline: Any, kwargs: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"baseline_kwargs must be .* got baseline_kwargs={re.escape(str(kwargs))}"):
        REINFORCE("MlpPolicy", ScriptedEnv([4]), baseline=baseline, baseline_kwargs=kwargs)


@pytest.mark.parametrize(
    ("baseline", "kwargs"),
    [(None, {}), ("linear", dict(ridge=0)), ("random_features", dict(ridge=1e-2, n_units=np.int64(1)))],
)
def test_baseline_kwargs_in_range_are_accepted(baseline: Any, kwargs: dict[str, Any]):
    model = REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=8, baseline=baseline, baseline_kwargs=kwargs)
    assert model.learn(1)._n_updates == 1


def test_policies_of_others_take_a_ridge_and_no_units():
    kwargs: dict[str, Any] = dict(n_steps=8, baseline="random_features")
    model = REINFORCE(ActorCriticPolicy, ScriptedEnv([4]), baseline_kwargs=dict(ridge=0.5), **kwargs)
    assert model.policy.value_net.ridge == 0.5
    with pytest.raises(ValueError, match="baseline_kwargs must be without n_units with ActorCriticPolicy"):
        REINFORCE(ActorCriticPolicy, ScriptedEnv([4]), baseline_kwargs=dict(n_units=5), **kwargs)


def test_n_steps_and_n_episodes_exclude_each_other():
    for n_steps in (100, 2000):
        with pytest.raises(ValueError, match=f"Exactly one .* got n_steps={n_steps}, n_episodes=5"):
            REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=n_steps, n_episodes=5)
    assert REINFORCE("MlpPolicy", ScriptedEnv([4]), n_episodes=5).n_steps is None
    assert REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=100).n_episodes is None


@pytest.mark.parametrize("argument", ["gae_lambda", "vf_coef", "max_grad_norm", "rms_prop_eps", "use_rms_prop", "nonsense"])
def test_arguments_without_a_meaning_here_are_type_errors(argument: str):
    with pytest.raises(TypeError, match=argument):
        REINFORCE("MlpPolicy", ScriptedEnv([4]), **{argument: 1.0})  # type: ignore[arg-type]


# Model files -----------------------------------------------------------------------------------------------------------------


def saved(model: Any, path: Path, change: Callable[[dict], Any] | None = None) -> Path:
    """Save a model, and change what its file says of it."""
    model.save(path)
    if change is not None:
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        data = json.loads(parts["data"])
        change(data)
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in (parts | {"data": json.dumps(data).encode()}).items():
                archive.writestr(name, part)
    return path


@pytest.fixture
def model() -> REINFORCE:
    return REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=8, policy_kwargs=dict(net_arch=[]))


def test_a_model_file_says_what_it_is(model: REINFORCE, tmp_path: Path):
    path = saved(model, tmp_path / "model.zip")
    with zipfile.ZipFile(path) as archive:
        assert json.loads(archive.read("data"))["file_format"] == FILE_FORMAT
    assert FILE_FORMAT.startswith("sb3_reinforce.REINFORCE ")
    _, found = read_model_file(path, {})
    assert (found["n_steps"], found["baseline"]) == (8, "random_features")
    # A model that was loaded is saved as one, too
    saved(REINFORCE.load(path), path)
    assert read_model_file(path, {})[1]["file_format"] == FILE_FORMAT


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(file_format="sb3_reinforce.REINFORCE 0"),
        lambda data: data.update(file_format="sb3_reinforce.REINFORCE 10"),
        lambda data: data.update(file_format="sb3_contrib.TRPO 1"),
        lambda data: data.pop("file_format"),
    ],
    ids=["older", "newer", "other", "none"],
)
def test_a_file_of_another_format_is_refused_with_both_formats(model: REINFORCE, change: Callable, tmp_path: Path):
    path = saved(model, tmp_path / "model.zip", change)
    message = r"model.zip holds a model of another algorithm, or of a version .* format is .*, not 'sb3_reinforce.REINFORCE "
    with pytest.raises(ValueError, match=message):
        REINFORCE.load(path)


def test_nothing_of_a_refused_file_is_unpickled(tmp_path: Path):
    class Poison:
        def __reduce__(self) -> Any:
            return (exec, (f"open({str(tmp_path / 'executed')!r}, 'w').close()",))

    def poison(data: dict) -> None:
        pickled = base64.b64encode(pickle.dumps(Poison())).decode()
        data["lr_schedule"] = {":type:": "<class 'function'>", ":serialized:": pickled}

    path = saved(A2C("MlpPolicy", ScriptedEnv([4])), tmp_path / "other.zip", poison)
    with pytest.raises(ValueError, match="another algorithm"):
        REINFORCE.load(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "kwargs",
    [
        *[dict(advantage=value) for value in ("q", "advantage", "td")],
        dict(baseline="linear"),
        dict(baseline=None),
        dict(baseline_memory=0.5),
        dict(baseline_kwargs=dict(n_units=5)),
        dict(normalize_observations=False),
    ],
    ids=str,
)
def test_what_the_policy_was_fitted_with_cannot_be_changed_by_load(model: REINFORCE, kwargs: dict[str, Any], tmp_path: Path):
    path = saved(model, tmp_path / "model.zip")
    ((name, value),) = kwargs.items()
    old = re.escape(repr(getattr(model, name)))
    message = rf"{name}={re.escape(repr(value))} cannot be given to a model that was saved with {name}={old}"
    with pytest.raises(ValueError, match=message):
        REINFORCE.load(path, **kwargs)
    # The same again is no change
    assert getattr(REINFORCE.load(path, **{name: getattr(model, name)}), name) == getattr(model, name)


@pytest.mark.parametrize("old", ["q", "advantage", "td"])
@pytest.mark.parametrize("new", ["monte_carlo", "q", "advantage", "td"])
def test_an_actor_critic_cannot_be_changed_into_another_by_load(old: Any, new: Any, tmp_path: Path):
    """Nor into REINFORCE, which has no use for its critic."""
    kwargs: dict[str, Any] = dict(n_steps=8, policy_kwargs=dict(net_arch=[]))
    path = saved(REINFORCE("MlpPolicy", ScriptedEnv([4]), advantage=old, **kwargs), tmp_path / "model.zip")
    if new == old:
        assert REINFORCE.load(path, advantage=new).advantage == new
    else:
        message = f"advantage='{new}' cannot be given to a model that was saved with advantage='{old}'"
        with pytest.raises(ValueError, match=message):
            REINFORCE.load(path, advantage=new)
    assert REINFORCE.load(path).advantage == old


def test_a_stream_is_read_from_wherever_it_is_and_stays_open(model: REINFORCE):
    """As in SB3, which rewinds it."""
    stream = io.BytesIO()
    model.save(stream)
    for position in (stream.tell(), 0, 5):
        stream.seek(position)
        assert REINFORCE.load(stream).n_steps == 8
    assert not stream.closed
