"""Settings for every test: property tests without deadlines (the first call compiles)."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("mmrec", deadline=None, max_examples=15, derandomize=True)
hypothesis.settings.load_profile("mmrec")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
