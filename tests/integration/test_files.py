"""Model files of earlier versions stay loadable, and those from strangers execute nothing where nothing should."""

import base64
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_reinforce import REINFORCE, newest_checkpoint
from sb3_reinforce.episodes.files import read_model_file
from tests.integration.common import assert_same, assert_same_parameters, random_env

FIXTURES = Path(__file__).parent.parent / "fixtures"
OBSERVATIONS = (np.random.default_rng(0).normal(size=(8, 4)) * [1, 1, 0.1, 1]).astype(np.float32)


def test_a_file_of_format_2_is_loaded_and_goes_on_learning_forever():
    """
    The file is never written again. This wrote it, at the top of the repository::

        kwargs = dict(n_steps=50, stats_window_size=5, policy_kwargs=dict(net_arch=[8]), baseline_kwargs=dict(n_units=8))
        model = REINFORCE("MlpPolicy", "CartPole-v1", seed=0, **kwargs).learn(500)
        model.save("tests/fixtures/model_format_2.zip")
    """
    path = FIXTURES / "model_format_2.zip"
    assert path.stat().st_size < 60_000
    model = REINFORCE.load(path, env="CartPole-v1")
    assert (model.seed, model.num_timesteps, model._n_updates, model._next_episode) == (0, 562, 8, 17)
    assert (model.n_steps, model.rollout_buffer.gamma, model.baseline) == (50, 0.99, "random_features")
    assert len(model.ep_info_buffer) == model.ep_info_buffer.maxlen == 5
    actions, _ = model.predict(OBSERVATIONS, deterministic=True)
    assert actions.tolist() == [1, 1, 1, 1, 1, 0, 0, 1]
    with th.no_grad():
        observations = model.policy.obs_to_tensor(OBSERVATIONS)[0]
        probabilities = model.policy.get_distribution(observations).distribution.probs[:, 1]
        values = model.policy.predict_values(observations).flatten()
    np.testing.assert_allclose(probabilities, [0.6459, 0.6557, 0.7848, 0.6509, 0.7167, 0.4081, 0.3940, 0.6023], atol=1e-4)
    np.testing.assert_allclose(values, [33.5477, 6.9591, -7.0489, -7.4239, -1.9174, 12.6353, 2.1381, -5.1593], atol=1e-3)

    new = REINFORCE("MlpPolicy", "CartPole-v1", policy_kwargs=dict(net_arch=[8]), baseline_kwargs=dict(n_units=8))
    new.set_parameters(path)
    assert_same_parameters(new, model)

    before = deepcopy(model.get_parameters()["policy"])
    model.learn(300, reset_num_timesteps=False)
    assert model.num_timesteps >= 862 and model._n_updates > 8
    after = model.get_parameters()["policy"]
    assert all(value.isfinite().all() for value in after.values())
    assert not th.equal(before["action_net.weight"], after["action_net.weight"])


# Files from strangers


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "executed")


def zipped(payload: Payload) -> bytes:
    """As PyTorch saves since version 1.6."""
    file = io.BytesIO()
    th.save({"weight": payload}, file)
    return file.getvalue()


def of_old_pytorch(payload: Payload) -> bytes:
    file = io.BytesIO()
    th.save({"weight": payload}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def pickled(payload: Payload) -> bytes:
    # The one that PyTorch writes
    return pickle.dumps(payload, protocol=2)


WRITERS = [zipped, of_old_pytorch, pickled]


def make_model(seed: int = 0) -> REINFORCE:
    # With a state of the optimizer
    return REINFORCE("MlpPolicy", random_env(), n_steps=16, target_kl=None, seed=seed)


@pytest.fixture
def trained() -> REINFORCE:
    return make_model(seed=1).learn(50)


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    """It does what it is there for."""
    payload = Payload(tmp_path / "executed")
    pickle.loads(pickle.dumps(payload))
    assert payload.path.read_text() == "executed"
    payload.path.unlink()
    return payload


def rewritten(path: Path, changes: dict[str, bytes]) -> Path:
    """A model file with other contents of some of its parts."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()} | changes
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return path


def hidden(path: Path, payload: Payload, name: str = "seed", **others: Any) -> Path:
    """A model file with something hidden among the attributes that are pickled."""
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read("data"))
    data[name] = {":type:": "<class 'int'>", ":serialized:": base64.b64encode(pickled(payload)).decode()}
    return rewritten(path, {"data": json.dumps(data | others).encode()})


@pytest.mark.parametrize("name", ["seed", "policy_class", "target_kl", "something_new"])
def test_weights_from_a_file_are_set_without_executing_what_is_hidden_in_its_attributes(
    name: str, trained: REINFORCE, payload: Payload, tmp_path: Path
):
    trained.save(tmp_path / "checkpoint_50_steps.zip")
    path, model = hidden(tmp_path / "checkpoint_50_steps.zip", payload, name), make_model()
    model.set_parameters(path)
    assert_same_parameters(model, trained)
    model.set_parameters(str(path), exact_match=False)
    # Nor by what looks at files
    _, saved = read_model_file(path, {})
    assert set(saved[name]) == {":type:", ":serialized:"}
    assert newest_checkpoint(tmp_path) == path
    assert not payload.path.exists()


def test_a_model_of_another_algorithm_is_refused_before_anything_in_it_is_executed(
    trained: REINFORCE, payload: Payload, tmp_path: Path
):
    trained.save(tmp_path / "model.zip")
    path = hidden(tmp_path / "model.zip", payload, file_format="other")
    with pytest.raises(ValueError, match="another algorithm"):
        REINFORCE.load(path)
    assert not payload.path.exists()


@pytest.mark.parametrize("exact_match", [True, False])
@pytest.mark.parametrize("part", ["policy.pth", "policy.optimizer.pth", "pytorch_variables.pth", "more.pth"])
@pytest.mark.parametrize("write", WRITERS)
def test_a_file_with_something_hidden_in_its_weights_is_refused_and_changes_nothing(
    write: Callable[[Payload], bytes],
    part: str,
    exact_match: bool,
    trained: REINFORCE,
    payload: Payload,
    tmp_path: Path,
):
    trained.save(tmp_path / "model.zip")
    path = rewritten(tmp_path / "model.zip", {part: write(payload)})
    model = make_model().learn(50)
    before = deepcopy(model.get_parameters())
    with pytest.raises(pickle.UnpicklingError):
        model.set_parameters(path, exact_match=exact_match)
    assert_same(dict(before), dict(model.get_parameters()))
    read_model_file(path, {})
    assert not payload.path.exists()
    # Training goes on as if nothing had been tried
    other = make_model().learn(50)
    assert_same_parameters(model.learn(50, reset_num_timesteps=False), other.learn(50, reset_num_timesteps=False))
