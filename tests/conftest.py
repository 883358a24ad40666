"""Shared by all tests: no hub, few threads, and tiny models made once."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as the commands set it, and as processes started by tests inherit it

from pathlib import Path

import pytest
from hypothesis import settings

from tests.devices import hide_gpus

# machines are noisy: time is never a test's result
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    """Before CUDA is looked for."""
    hide_gpus([str(argument) for argument in config.args])


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_stays() -> None:
    """Frozen for good. A run looks all objects through once, as it begins: half a second, of the three it takes."""
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where :func:`tests.tiny.tiny_model` saves its models."""
    return tmp_path_factory.mktemp("models")
