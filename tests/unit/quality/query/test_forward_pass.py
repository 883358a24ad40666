"""Hidden states by batches of any make against one sample at a time, and a pass that is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.reference.query import mean_state
from tests.unit.quality.query.texts import Killed, Texts
from tests.unit.quality.toys import KINDS, lora_model
from tests.worlds import run_on_ranks
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.features.forward_pass import ForwardPass
from tsqlora_scale.quality.features.hidden_states import mean_states, without_adapters
from tsqlora_scale.quality.query.looks import FeatureLook, upper_layers
from tsqlora_scale.tasks.batch import Batch


def one_by_one(model: nn.Module, pool: Texts) -> list[np.ndarray]:
    """Means of every layer's states over source and target of each sample alone, unpadded: (L, R, d) each."""
    found = []
    with torch.no_grad(), without_adapters(model):
        for index in range(len(pool)):
            batch = pool.batch(np.array([index]))
            outputs = model(**batch.inputs, output_hidden_states=True)
            tokens = list(range(batch.inputs["input_ids"].shape[1]))
            if pool.seq2seq:
                answer = list(range(batch.targets.shape[1]))
                regions = [(outputs.encoder_hidden_states, tokens), (outputs.decoder_hidden_states, answer)]
            elif pool.generates:
                asked = max(1, len(tokens) - 2)
                regions = [(outputs.hidden_states, tokens[:asked]), (outputs.hidden_states, tokens[asked:])]
            else:
                regions = [(outputs.hidden_states, tokens)]
            found.append(np.stack([mean_state(states, 0, positions) for states, positions in regions], 1))
    return found


def look_at_all(module: nn.Module, batch: Batch) -> Tensor:
    return mean_states(module(**batch.inputs, output_hidden_states=True), batch).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_samples_alone(kind: str, models_dir: Path) -> None:
    model, pool = lora_model(kind, models_dir), Texts(kind, 11)
    wanted = one_by_one(model.eval(), pool)
    passes = ForwardPass(model.train(), World(), batch_size=4, shard_size=6)
    found = passes.run(pool, np.arange(11), look_at_all, name="x")
    assert found.dtype == np.float32
    for row, states in zip(found, wanted, strict=True):
        np.testing.assert_allclose(row.reshape(states.shape), states, atol=2e-5)
    assert model.training, "as it was"


def test_a_classifier_with_a_decoder_is_looked_at_in_its_encoder(models_dir: Path) -> None:
    outputs = type("Outputs", (), {})()
    outputs.encoder_hidden_states = tuple(torch.randn(2, 3, 4) for _ in range(3))
    outputs.decoder_hidden_states = tuple(torch.randn(2, 3, 4) for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = mean_states(outputs, Batch({"attention_mask": mask}, torch.tensor([0, 1]), np.arange(2)))
    assert found.shape == (2, 2, 1, 4), "as many layers as both have"
    wanted = mean_state(outputs.encoder_hidden_states[-2:], 0, [0, 1])
    np.testing.assert_allclose(found[0, :, 0].numpy(), wanted, atol=1e-6)


def test_adapters_come_back(models_dir: Path) -> None:
    model, pool = lora_model("bert", models_dir).eval(), Texts("bert", 3)
    batch = pool.batch(np.arange(3))
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        before = model(**batch.inputs).logits
        with without_adapters(model):
            frozen = model(**batch.inputs).logits
        again = model(**batch.inputs).logits
    assert not torch.allclose(before, frozen)
    assert torch.equal(before, again)
    assert trains == {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["bert", "bart", "llama"])
def test_a_look_has_features_and_a_target_or_loss(kind: str, models_dir: Path) -> None:
    model, pool = lora_model(kind, models_dir), Texts(kind, 7)
    look = FeatureLook(pool, seed=0)
    numbers = ForwardPass(model, World(), batch_size=3).run(pool, np.arange(7), look, name="x")
    assert look.shape is not None
    features, last = look.shape.split(numbers)
    wanted = one_by_one(model.eval(), pool)
    for row, states in zip(features, wanted, strict=True):
        np.testing.assert_allclose(row, states[upper_layers(len(states))], atol=2e-5)
    if kind == "bert":
        assert look.shape.kind == "classes"
        assert last.tolist() == pool.labels.tolist()
    else:
        assert look.shape.kind == "text"
        with torch.no_grad(), without_adapters(model):
            alone = [float(pool.losses(model, pool.batch(np.array([i])))) for i in range(7)]
        np.testing.assert_allclose(last, alone, atol=2e-5)


def test_wide_features_are_projected(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tsqlora_scale.quality.query import looks

    pool = Texts("bert", 400)
    look = FeatureLook(pool, seed=0)
    states = torch.randn(400, 2, 1, 1000)
    assert look._narrowed(states).shape == (400, 2, 1, looks.WIDTH)
    assert torch.equal(look._narrowed(states), FeatureLook(pool, seed=0)._narrowed(states)), "by the seed alone"
    cosines = [nn.functional.cosine_similarity(x[:-1, 0, 0], x[1:, 0, 0]) for x in (states, look._narrowed(states))]
    assert float((cosines[0] - cosines[1]).abs().mean()) < 2 / looks.WIDTH**0.5


def test_upper_layers() -> None:
    assert upper_layers(2) == [1]
    assert upper_layers(3) == [1, 2]
    assert upper_layers(7) == [3, 4, 5, 6]
    assert upper_layers(13) == [6, 8, 10, 12]


class Counted:
    """A look that counts the samples it has seen, and dies after some."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.seen, self.dies_after = 0, dies_after

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        if self.dies_after is not None and self.seen >= self.dies_after:
            raise Killed
        self.seen += batch.size
        return look_at_all(module, batch)


def test_a_killed_pass_is_taken_up(models_dir: Path, tmp_path: Path) -> None:
    model, pool = lora_model("bert", models_dir), Texts("bert", 12)
    rows = np.arange(12)[::-1].copy()

    def passes(folder: Path | None, shard: int = 4) -> ForwardPass:
        return ForwardPass(model, World(), batch_size=2, shard_size=shard, folder=folder)

    wanted = passes(None).run(pool, rows, look_at_all, name="x")
    with pytest.raises(Killed):
        passes(tmp_path / "parts").run(pool, rows, Counted(8), name="x")
    look = Counted()
    np.testing.assert_array_equal(passes(tmp_path / "parts").run(pool, rows, look, name="x"), wanted)
    assert look.seen == 12 - 8
    look = Counted()
    np.testing.assert_array_equal(passes(tmp_path / "parts").run(pool, rows, look, name="x"), wanted)
    assert look.seen == 0, "the whole is kept"
    for run, name, of in (
        (passes(tmp_path / "parts"), "another look", rows),
        (passes(tmp_path / "parts", shard=6), "x", rows),
        (passes(tmp_path / "parts"), "x", rows[::-1].copy()),
    ):
        look = Counted()
        found = run.run(pool, of, look, name=name)
        np.testing.assert_allclose(found, wanted[:: 1 if of is rows else -1], atol=1e-6)
        assert look.seen == 12, "numbers of something else"
    (torn,) = (sorted(path.iterdir())[0] for path in [next((tmp_path / "parts").iterdir())])
    torn.write_bytes(torn.read_bytes()[:40])
    np.testing.assert_array_equal(passes(tmp_path / "parts").run(pool, rows, look_at_all, name="x"), wanted)
    passes(tmp_path / "parts").forget()
    assert not (tmp_path / "parts").exists()


def test_a_folder_that_cannot_be_costs_nothing_but_time(models_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, pool = lora_model("bert", models_dir), Texts("bert", 5)
    found = ForwardPass(model, World(), folder=tmp_path / "file").run(pool, np.arange(5), look_at_all, name="x")
    assert found.shape[0] == 5


def test_what_does_not_fit_is_halved_and_a_sample_that_does_not_is_named(models_dir: Path) -> None:
    model, pool = lora_model("bert", models_dir), Texts("bert", 9)
    wanted = ForwardPass(model, World(), batch_size=2).run(pool, np.arange(9), look_at_all, name="x")

    def small(limit: int) -> Any:
        def look(module: nn.Module, batch: Batch) -> Tensor:
            if batch.size > limit:
                raise MemoryError("no room")
            return look_at_all(module, batch)

        return look

    found = ForwardPass(model, World(), batch_size=8).run(pool, np.arange(9), small(2), name="x")
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    with pytest.raises(UserError, match="a single sample"):
        ForwardPass(model, World(), batch_size=8).run(pool, np.arange(9), small(0), name="x")


def of_world(world: World, kind: str, folder: Path, size: int) -> np.ndarray:
    model, pool = lora_model(kind, folder), Texts(kind, size)
    return ForwardPass(model, world, batch_size=2, shard_size=5).run(pool, np.arange(size), look_at_all, name="x")


@pytest.mark.parametrize("size", [11, 1])
def test_any_number_of_ranks_sees_the_same(size: int, models_dir: Path) -> None:
    alone = of_world(World(), "bert", models_dir, size)
    for found in run_on_ranks(of_world, 2, "bert", models_dir, size):
        np.testing.assert_array_equal(found, alone)
