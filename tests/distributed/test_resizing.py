"""Fifty resizes in a row leave nothing behind, under every engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoTokenizer

from tests.distributed.launch import launch
from tests.runs import run_tree, write_config
from tests.tiny import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).with_name("resizing.py")
COUNT = 50
#: Of an engine whose resizes are looked at one by one alone.
FEWER = {"zero3-3": 15}
#: Resizes after which caches are full and pools have their size.
WARM = 15
#: Two rounds of resizes, after which the ranks repeat.
ROUNDS = 14
#: Elements of a factor that ZeRO-3 leaves whole: rank 4 of 32 inputs is at it, ranks above cross it.
THRESHOLD = 128
BASE_BYTES = 2_560_000
#: Of resident memory between ``WARM`` and the end, for the allocator's moods.
SLACK = 8 * 2**20


def with_large_vocabulary(models: Path, folder: Path) -> Path:
    """Tiny BERT with 2.5 MB of embeddings, most of which no text uses: a base far larger than what is trained."""
    tiny = tiny_model("bert", models)
    model = AutoModel.from_pretrained(tiny)
    model.resize_token_embeddings(BASE_BYTES // (4 * 32), mean_resizing=False)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Any:
    """A function: engine -> what ``resizing.py`` wrote. An engine runs once."""
    done: dict[str, dict[str, Any]] = {}

    def outcome(engine: str) -> dict[str, Any]:
        if engine not in done:
            folder = tmp_path_factory.mktemp(engine)
            tree = run_tree(
                "bert", folder, models_dir, "resizing", scoring={"enabled": False}, sampling={"selector": "full"},
                model={"name_or_path": str(with_large_vocabulary(models_dir, folder))},
                train={"max_steps": 100, "lr": 1e-3, "micro_batch_size": 6},
            )  # fmt: skip
            config = write_config(folder / "config.yaml", tree)
            arguments = [str(config), str(folder / "out.json"), str(FEWER.get(engine, COUNT))]
            launch(engine, SCRIPT, arguments, folder, persistence=THRESHOLD)
            done[engine] = json.loads((folder / "out.json").read_text())
        return done[engine]

    return outcome


@pytest.mark.parametrize("engine", ["plain", "ddp-2", "zero3-2"])
def test_resizes_leave_nothing_behind(engine: str, outcomes: Any) -> None:
    outcome = outcomes(engine)
    assert outcome["engine"] == engine.split("-")[0]
    for lines in outcome["ranks"]:
        assert len(lines) == COUNT
        warm = lines[WARM:]
        # The least of two rounds: a collective under way may hold some more tensors, now and then. What a resize leaves
        # behind stays, and is in each of the later counts.
        for key in ("hooks", "threads", "system_threads", "files", "tensors", "tensor_bytes"):
            early, late = ([line[key] for line in part] for part in (warm[:ROUNDS], warm[-ROUNDS:]))
            assert min(early) == min(late), f"{key}: {early} and, later, {late}"
        first, last = (max(line["resident_bytes"] for line in part) for part in (warm[:7], warm[-7:]))
        assert last - first < SLACK


@pytest.mark.parametrize("engine", ["ddp-2", "zero3-2", "zero3-3"])
def test_a_resize_does_not_send_the_base(engine: str, outcomes: Any) -> None:
    """Nor gather or shard it anew."""
    sent = [line["sent_bytes"] for lines in outcomes(engine)["ranks"] for line in lines]
    assert 0 < max(sent) < BASE_BYTES / 4


@pytest.mark.parametrize("engine", ["ddp-2", "zero3-2", "zero3-3"])
def test_the_training_is_the_same(engine: str, outcomes: Any) -> None:
    losses = outcomes(engine)["losses"]
    assert len(losses) == FEWER.get(engine, COUNT)
    assert losses == pytest.approx(outcomes("plain")["losses"][: len(losses)], abs=1e-5)
