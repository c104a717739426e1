"""Validation of hyperparameters, spaces, policies and model files. Errors name the argument, its value and the remedy."""

import functools
import inspect
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib import TRPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_reinforce import REINFORCE
from sb3_reinforce.episodes.checks import FILE_FORMAT, check_scheduled, read_model_file
from tests.envs import RandomEnv, ScriptedEnv
from tests.runs.common import assert_same_parameters

VECTOR = spaces.Box(-1, 1, (3,))
CHOICE = spaces.Discrete(3)

# Hyperparameters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("n_steps", value) for value in (0, 2.5, "3", True)],
        *[("n_episodes", value) for value in (-3, 1.5)],
        *[("gamma", value) for value in (0.0, 1.1, np.nan, None)],
        *[("ent_coef", value) for value in (-0.1, np.inf)],
        *[("target_kl", value) for value in (0.0, np.nan, "lin_1e-2")],
        *[("cg_max_steps", value) for value in (0, None)],
        *[("cg_damping", value) for value in (0.0, np.inf, "Auto", None)],
        *[("learning_rate", value) for value in (-1e-3, np.nan, "lin_5e-3")],
        *[("max_episode_steps", value) for value in (0, 1.5)],
        *[("baseline_memory", value) for value in (-0.1, 1.0, np.nan)],
        *[("baseline", value) for value in ("quadratic", 3)],
        *[("baseline_kwargs", dict(ridge=value)) for value in (-1.0, np.nan, "1", None)],
        *[("baseline_kwargs", dict(n_units=value)) for value in (0, 2.5)],
        *[("baseline_kwargs", value) for value in (dict(units=3), dict(ridge=1.0, memory=0.5))],
        *[("advantage", value) for value in ("TD", "", None, True)],
        ("stats_window_size", 0),
        ("rollout_buffer_class", RolloutBuffer),
    ],
)
def test_arguments_out_of_range_are_refused_with_name_and_value(argument: str, value: Any):
    with pytest.raises(ValueError, match=rf"{argument} must be .*got {argument}=.*{re.escape(str(value))}"):
        REINFORCE("MlpPolicy", ScriptedEnv([4]), **{argument: value})


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e-3, "1", 1e39])
def test_schedules_must_return_finite_values_of_at_least_0(value: Any):
    check_scheduled("learning_rate", 0.0, 0.5)
    with pytest.raises(ValueError, match=rf"learning_rate must .* its schedule returns {re.escape(str(value))} at .*=0.5"):
        check_scheduled("learning_rate", value, 0.5)


@pytest.mark.parametrize(("baseline", "kwargs"), [(None, dict(ridge=1.0)), ("linear", dict(n_units=5))])
def test_baseline_kwargs_of_another_baseline_are_refused(baseline: Any, kwargs: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"baseline_kwargs must be .* got baseline_kwargs={re.escape(str(kwargs))}"):
        REINFORCE("MlpPolicy", ScriptedEnv([4]), baseline=baseline, baseline_kwargs=kwargs)


@pytest.mark.parametrize("advantage", ["q", "advantage", "td"])
def test_actor_critics_need_a_baseline(advantage: Any):
    message = f"advantage must be 'monte_carlo' with baseline=None: .* got advantage='{advantage}'"
    with pytest.raises(ValueError, match=message):
        REINFORCE("MlpPolicy", ScriptedEnv([4]), baseline=None, advantage=advantage)


def test_one_of_n_steps_and_n_episodes_is_given():
    with pytest.raises(ValueError, match="n_steps and n_episodes are both None: one of them must be given"):
        REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=None, n_episodes=None)
    for n_steps, n_episodes in ((None, 5), (5, None), (5, 5)):
        assert REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=n_steps, n_episodes=n_episodes).learn(1)._n_updates == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_of_numpy_are_accepted(dtype: type):
    kwargs: dict[str, Any] = dict(target_kl=dtype(0.01), cg_damping=dtype(0.1), ent_coef=dtype(0.1), cg_max_steps=np.int64(5))
    kwargs |= dict(seed=np.int64(3), n_steps=np.int32(8), baseline_kwargs=dict(ridge=dtype(0.1), n_units=np.int64(1)))
    assert REINFORCE("MlpPolicy", ScriptedEnv([4]), **kwargs).learn(1)._n_updates == 1


@pytest.mark.parametrize("cls", [A2C, PPO, TRPO])
def test_arguments_without_a_meaning_are_type_errors_that_name_the_page_which_lists_them(cls: Any):
    page = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()
    for name in inspect.signature(cls).parameters.keys() - inspect.signature(REINFORCE).parameters.keys():
        with pytest.raises(TypeError, match=f"'{name}'.* docs/migration.md"):
            REINFORCE("MlpPolicy", ScriptedEnv([4]), **{name: 1.0})
        assert f"`{name}" in page


def test_no_environment_is_refused_unless_the_model_is_set_up_later():
    with pytest.raises(ValueError, match="env=None has no spaces"):
        REINFORCE("MlpPolicy", None)
    REINFORCE("MlpPolicy", None, _init_setup_model=False)


@pytest.mark.parametrize(
    "policy", [RecurrentActorCriticPolicy, ScriptedEnv, ActorCriticPolicy(VECTOR, CHOICE, lambda _: 1e-3)]
)
def test_policies_must_be_classes_of_actor_critics_without_recurrent_states(policy: Any):
    with pytest.raises(ValueError, match="subclass of SB3's ActorCriticPolicy that is not recurrent"):
        REINFORCE(policy, ScriptedEnv([4]))


# Spaces ----------------------------------------------------------------------------------------------------------------------

NAN_BOUNDS = spaces.Box(-1, 1, (2,))
NAN_BOUNDS.low[0] = np.nan
MATRIX = spaces.MultiDiscrete([[2], [3]])
OTHERS = [spaces.Tuple([VECTOR]), spaces.Text(3), spaces.Sequence(VECTOR), spaces.Graph(VECTOR, None), spaces.Dict()]
EMPTY = [spaces.Box(-1, 1, ()), spaces.Box(-1, 1, (0,)), spaces.Box(-1, 1, (2, 0))]


@pytest.mark.filterwarnings("ignore:.*Getting the length of a multi-dimensional")
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            dict(action=spaces.Tuple([CHOICE, CHOICE])),
            "is none of Box, Discrete, MultiDiscrete, MultiBinary: use TransformAction",
        ),
        (dict(action=spaces.Dict(a=CHOICE)), r"action space Dict.* is none of"),
        (dict(action=spaces.MultiBinary((2, 3))), r"action space MultiBinary\(\(2, 3\)\) is not one-dimensional: use"),
        (dict(action=MATRIX), r"(?s)action space MultiDiscrete.* is not one-dimensional: use"),
        (dict(action=spaces.Discrete(3, start=1)), "action space .* does not start at 0: use TransformAction"),
        (dict(action=spaces.MultiDiscrete([2, 3], start=[0, 1])), "action space .* does not start at 0"),
        (dict(action=NAN_BOUNDS), r"NaN bounds: low=\[nan"),
        (
            dict(action=CHOICE, use_sde=True),
            r"use_sde=True \(gSDE\) needs continuous actions, but the environment has Discrete",
        ),
        (
            dict(action=spaces.Box(0, np.inf, (2,)), use_sde=True, policy_kwargs=dict(squash_output=True)),
            "squash_output=True needs finite action bounds, got low=",
        ),
        (dict(observation=MATRIX), r"(?s)observation space MultiDiscrete.* is not one-dimensional"),
        (dict(observation=spaces.Discrete(3, start=1)), "observation space .* does not start at 0"),
        *(
            (dict(observation=space), r"observation space .* is none of .*, or a Dict of these: use Flatten")
            for space in OTHERS
        ),
        *((dict(observation=spaces.Dict(a=VECTOR, b=space)), "The entry 'b' of the .* leave it out") for space in OTHERS),
        *((dict(observation=space), "has no number or no dimension: use") for space in EMPTY),
        *(
            (dict(observation=spaces.Dict(a=space), policy="MultiInputPolicy"), "entry 'a' of .* has no number")
            for space in EMPTY
        ),
        (dict(observation=spaces.Dict(a=VECTOR)), "You must use `MultiInputPolicy`"),
        (dict(observation=spaces.Dict(a=VECTOR), policy="CnnPolicy"), "You must use `MultiInputPolicy`"),
        (
            dict(observation=spaces.Dict(a=MATRIX), policy="MultiInputPolicy"),
            r"entry 'a' of the observation space MultiDiscrete",
        ),
        (dict(policy="MultiInputPolicy"), "MultiInputPolicy needs a dictionary observation space, got Box"),
    ],
    ids=lambda value: ", ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_unsupported_spaces_are_refused_with_a_remedy(kwargs: dict[str, Any], message: str):
    def construct(policy: str = "MlpPolicy", observation: Any = VECTOR, action: Any = CHOICE, **kwargs: Any) -> None:
        REINFORCE(policy, RandomEnv(observation, action, 7), **kwargs)

    with pytest.raises(ValueError, match=message):
        construct(**kwargs)


# Model files -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=16, seed=0, policy_kwargs=dict(net_arch=[4])).save(tmp_path / "model")
    return tmp_path / "model.zip"


def rewrite(path: Path, changes: dict[str, bytes | None], **attributes: Any) -> None:
    """Replace parts of a model file, or remove those that are None, and replace attributes."""
    with zipfile.ZipFile(path) as archive:
        parts: dict[str, Any] = {name: archive.read(name) for name in archive.namelist()}
    parts["data"] = json.dumps(json.loads(parts["data"]) | attributes).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in (parts | changes).items():
            if part is not None:
                archive.writestr(name, part)


@pytest.mark.parametrize("kind", ["str_without_suffix", "str", "path", "bytes_io", "file"])
def test_complete_files_are_read_from_any_place(path: Path, kind: str):
    stream = io.BytesIO(path.read_bytes())
    stream.seek(7)
    with open(path, "rb") as file:
        places: dict[str, Any] = dict(str=str(path), path=path, bytes_io=stream, file=file)
        content, saved = read_model_file(places.get(kind, str(path.with_suffix(""))))
        assert content.tell() == 0 and content.read() == path.read_bytes()
        assert (saved["seed"], saved["n_steps"], saved["file_format"]) == (0, 16, FILE_FORMAT)
        # Pickled attributes stay pickled, and streams stay open
        assert set(saved["policy_class"]) >= {":type:", ":serialized:"} and not stream.closed and not file.closed


def test_fixed_arguments_must_equal_the_saved_ones(path: Path):
    fixed = ("n_steps", "gamma")
    for changes in (None, {}, dict(n_steps=16), dict(seed=1)):
        read_model_file(path, changes, fixed)
    expected = "gamma=0.5 cannot be given to a model whose policy was fitted with gamma=0.99: make a new model"
    with pytest.raises(ValueError, match=expected):
        read_model_file(path, dict(n_steps=16, gamma=0.5), fixed)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + bytes(18)], ids=range(3))
def test_files_that_are_no_archives_are_refused(path: Path, content: bytes):
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"model\.zip is not a complete model file: damaged, truncated, or of another kind \("
    ):
        read_model_file(path)
    with pytest.raises(FileNotFoundError):
        read_model_file(path.with_name("missing"))


@pytest.mark.parametrize("part", ["data", "policy.pth", "policy.optimizer.pth"])
def test_files_without_a_part_are_refused(path: Path, part: str):
    rewrite(path, {part: None})
    with pytest.raises(ValueError, match=r"model\.zip is not a complete model file"):
        read_model_file(path)


@functools.cache
def trained_and_saved() -> tuple[REINFORCE, bytes]:
    model, file = (
        REINFORCE("MlpPolicy", ScriptedEnv([4]), n_steps=9, policy_kwargs=dict(net_arch=[4]), target_kl=None).learn(9),
        io.BytesIO(),
    )
    model.save(file)
    return model, file.getvalue()


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_file_is_refused_or_loaded_without_a_difference(data: Any):
    """Bytes are changed, removed or inserted anywhere, or in the directory of the archive at the end."""
    model, content = trained_and_saved()
    size = len(content)
    start = data.draw(st.one_of(st.integers(0, size - 1), st.integers(size - 600, size - 1)))
    n_lost = data.draw(st.one_of(st.integers(0, 50), st.just(size)))
    damaged = content[:start] + data.draw(st.binary(max_size=50)) + content[start + n_lost :]
    try:
        loaded = REINFORCE.load(io.BytesIO(damaged))
    except ValueError as error:
        assert "is not a complete model file" in str(error)
    else:
        assert_same_parameters(loaded, model)


def test_files_of_other_kinds_are_refused(path: Path):
    rewrite(path, {"data": b"[1, 2]"})
    with pytest.raises(ValueError, match=r"is not a complete model file: .* data are no attributes"):
        read_model_file(path)
    stream = io.BytesIO()
    A2C("MlpPolicy", ScriptedEnv([4])).save(stream)
    expected = f"algorithm or version: its format is None instead of '{FILE_FORMAT}', its policy from stable_baselines3"
    with pytest.raises(ValueError, match=expected):
        read_model_file(stream)
    assert not stream.closed


def test_files_of_earlier_formats_are_refused(path: Path):
    rewrite(path, {}, file_format="sb3_reinforce.REINFORCE 3", policy_class=None)
    expected = (
        r"another algorithm or version: its format is 'sb3_reinforce.REINFORCE 3' instead of .*, its policy from unknown"
    )
    with pytest.raises(ValueError, match=expected):
        read_model_file(path)
