from pathlib import Path

import pytest

from tests.unit.quality.sites import Site, make_site


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session's tiny models lie."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Site:
    """Sentences of two classes, and an encoder."""
    return make_site("bert", tmp_path_factory.mktemp("site"), models_dir)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Site:
    """Texts to be written, and a causal model."""
    return make_site("llama", tmp_path_factory.mktemp("texts"), models_dir)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Site:
    """As ``site``, without a query."""
    return make_site("bert", tmp_path_factory.mktemp("alone"), models_dir, with_query=False)
