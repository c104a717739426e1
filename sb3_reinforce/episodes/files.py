"""Model files: what they say of themselves, read before anything in them is unpickled."""

import io
import json
import pathlib
import zipfile
import zlib
from typing import Any

from stable_baselines3.common.save_util import open_path

#: What a model file says of itself, under the name ``file_format``. The number grows when older files cannot be loaded.
FILE_FORMAT = "sb3_reinforce.REINFORCE 2"


def read_model_file(
    path: str | pathlib.Path | io.BufferedIOBase, changes: dict[str, Any], fixed: tuple[str, ...] = ()
) -> tuple[io.BytesIO, dict[str, Any]]:
    """
    Read a file, and look at what it says of itself before anything in it is unpickled.

    :param path: where a model was saved, as for SB3's ``load``
    :param changes: arguments that are to replace those that were saved
    :param fixed: arguments that cannot be replaced
    :return: the file in memory, and the saved attributes, without those that are pickled
    :raises ValueError: if that is no complete file, a model of another algorithm, or one that cannot be changed so
    """
    file = open_path(path, "r", suffix="zip")
    file.seek(0)
    content = io.BytesIO(file.read())
    if isinstance(path, (str, pathlib.Path)):
        file.close()
    try:
        with zipfile.ZipFile(content) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile(f"{archive.testzip()} in it is damaged")
            saved = json.loads(archive.read("data"))
            if not isinstance(saved, dict):
                raise ValueError("its data are no attributes")
            archive.getinfo("policy.pth"), archive.getinfo("policy.optimizer.pth")
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is no complete model file: it is damaged, cut short, or was never one ({error})") from error
    if saved.get("file_format") != FILE_FORMAT:
        policy_class = saved.get("policy_class")
        policy_class = policy_class.get("__module__", "unknown") if isinstance(policy_class, dict) else "unknown"
        raise ValueError(
            f"{path} holds a model of another algorithm, or of a version of REINFORCE that cannot be loaded any more: its "
            f"format is {saved.get('file_format')!r}, not {FILE_FORMAT!r}, its policy from {policy_class}. Load it with the "
            "class that saved it"
        )
    for name in fixed:
        if name in changes and changes[name] != saved.get(name):
            raise ValueError(
                f"{name}={changes[name]!r} cannot be given to a model that was saved with {name}={saved.get(name)!r}: "
                "its policy holds what was fitted with that. Make a new model"
            )
    content.seek(0)
    return content, saved
