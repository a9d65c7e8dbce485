import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as processors: a thread for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("inrun", deadline=None)  # how long an example takes is the machine's other work
settings.load_profile("inrun")


@pytest.fixture
def float64() -> Iterator[None]:
    """Everything in double precision, where rounding cannot hide a missing term."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
