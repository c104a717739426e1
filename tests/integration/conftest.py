"""What the tests of whole runs share without asking for it."""

from collections.abc import Iterator

import pytest
import torch as th


@pytest.fixture(autouse=True)
def checked_distributions() -> Iterator[None]:
    """Distributions check their parameters, as they do by default: ``torch.compile`` turns that off for the whole process."""
    th.distributions.Distribution.set_default_validate_args(True)
    yield
    th.distributions.Distribution.set_default_validate_args(True)
