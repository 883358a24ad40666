"""A private Arrow cache, small files, and tiny models with their tokenizers."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.tiny import tiny_model
from tests.unit.tasks.cases import task_config
from tsqlora_scale.tasks import Task, build_task, load_data


@pytest.fixture(scope="session", autouse=True)
def arrow_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests' own cache of converted files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("arrow")))
        yield


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a file into the test's folder; ``.gz`` names are compressed."""

    def write(name: str, content: str | bytes) -> Path:
        data = content.encode() if isinstance(content, str) else content
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model by its kind."""
    folder = tmp_path_factory.mktemp("models")
    return lambda kind: tiny_model(kind, folder)


@pytest.fixture
def make_task(models: Callable[[str], Path], tmp_path: Path) -> Callable[..., Task]:
    """A task on ``train.tsv`` of the test's folder (also as dev set) with the tokenizer of a tiny model."""

    def make(model: str, kind: dict[str, Any], tsv: str, *, template: str | None = None, **dataset: Any) -> Task:
        (tmp_path / "train.tsv").write_text(tsv)
        cfg = task_config(tmp_path, kind, dev_file="train.tsv", **dataset)
        folder = models(model)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template or tokenizer.chat_template
        return build_task(cfg, load_data(cfg, seed=0), tokenizer, AutoConfig.from_pretrained(folder))

    return make
