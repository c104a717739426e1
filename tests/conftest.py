"""Settings and fixtures of all tests."""

from collections.abc import Iterator

import pytest
import torch as th
from hypothesis import settings

# The time of one example depends on the machine; nothing here is a test of speed
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Small networks are fastest on one thread, and results do not depend on the number of cores."""
    before = th.get_num_threads()
    th.set_num_threads(1)
    yield
    th.set_num_threads(before)


@pytest.fixture(autouse=True)
def checked_distributions() -> Iterator[None]:
    """Let distributions check their parameters: ``torch.compile`` turns that off for the whole process."""
    th.distributions.Distribution.set_default_validate_args(True)
    yield
    th.distributions.Distribution.set_default_validate_args(True)
