from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session's tiny models lie."""
    return tmp_path_factory.mktemp("tiny")
