"""Sphinx inventories of the objects of other projects that api.md refers to, because a build needs no network."""

import zlib
from pathlib import Path

#: Project -> address of its documentation, and page -> names in Python. A page that ends with an anchor has one name
PROJECTS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "stable_baselines3": (
        "https://stable-baselines3.readthedocs.io/en/master/",
        {
            "guide/callbacks.html": [
                "stable_baselines3.common.callbacks.BaseCallback",
                "stable_baselines3.common.callbacks.EvalCallback",
            ],
            "common/distributions.html": ["stable_baselines3.common.distributions.Distribution"],
            "common/logger.html": ["stable_baselines3.common.logger.Logger"],
            "modules/a2c.html#stable_baselines3.a2c.MlpPolicy": ["stable_baselines3.common.policies.ActorCriticPolicy"],
            "guide/vec_envs.html#stable_baselines3.common.vec_env.VecEnv": [
                "stable_baselines3.common.vec_env.base_vec_env.VecEnv",
                "VecEnv",
            ],
            "guide/vec_envs.html#stable_baselines3.common.vec_env.VecNormalize": [
                "stable_baselines3.common.vec_env.vec_normalize.VecNormalize"
            ],
        },
    ),
    "torch": (
        "https://docs.pytorch.org/docs/stable/",
        {"tensors.html": ["torch.Tensor"], "tensor_attributes.html": ["torch.device"]},
    ),
    "gymnasium": (
        "https://gymnasium.farama.org/",
        {
            "api/env/#gymnasium.Env": ["gymnasium.core.Env"],
            "api/spaces/#gymnasium.spaces.Space": ["gymnasium.spaces.space.Space"],
            "api/registry/": ["gymnasium.envs.registration.EnvSpec"],
        },
    ),
    "numpy": ("https://numpy.org/doc/stable/", {"reference/generated/numpy.ndarray.html": ["numpy.ndarray"]}),
    "python": (
        "https://docs.python.org/3/",
        {
            "library/collections.abc.html": [
                f"collections.abc.{name}" for name in ("Callable", "Generator", "Iterable", "Sequence")
            ],
            "library/concurrent.futures.html#concurrent.futures.Executor": ["concurrent.futures._base.Executor"],
            "library/io.html": ["io.BufferedIOBase"],
            "library/pathlib.html": ["pathlib.Path"],
        },
    ),
}


def write_inventories(folder: Path) -> dict[str, tuple[str, str]]:
    """Write an inventory for each project to a folder, and return the ``intersphinx_mapping``."""
    folder.mkdir(parents=True, exist_ok=True)
    for project, (_, pages) in PROJECTS.items():
        head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version:\n# The remainder is compressed using zlib.\n"
        targets = {name: page if "#" in page else f"{page}#{name}" for page, names in pages.items() for name in names}
        lines = [f"{name} py:class 1 {target} -\n" for name, target in targets.items()]
        (folder / f"{project}.inv").write_bytes(head.encode() + zlib.compress("".join(lines).encode()))
    return {project: (address, str(folder / f"{project}.inv")) for project, (address, _) in PROJECTS.items()}
