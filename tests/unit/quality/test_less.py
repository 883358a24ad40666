"""``sampling.selector: less``: cosines of gradients, or of Adam's steps by them, to the query's gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import selectors as reference
from tests.unit.quality.sites import QUERY, ROWS, Site, make_site
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.engine.train_state import ParamState, TrainState
from tsqlora_scale.quality.gradients.adam_update import AdamUpdate
from tsqlora_scale.quality.gradients.sketch import Sketch
from tsqlora_scale.quality.selectors import less

#: The defaults of the config.
BETAS, EPS = (0.9, 0.999), 1e-8


def own_sketches(site: Site, pool: Any, state: TrainState | None = None) -> np.ndarray:
    """Sketches of every sample's gradient, one sample at a time, by autograd; with a ``state`` of the step that the
    optimizer takes by it."""
    sketch = Sketch(site.tree["scoring"]["sketch_dim"], seed=site.tree["run"]["seed"])
    names = [name for name, _ in site.module.named_parameters() if "lora_" in name]
    found = []
    for row in range(len(pool)):
        batch = pool.batch(np.array([row]))
        gradients = reference.own_gradients(site.module, pool.losses, batch)
        if state is not None:
            gradients = [
                reference.step_by_torch(state.params[name], state.optimizer_steps, gradient, BETAS, EPS)
                for name, gradient in zip(names, gradients, strict=True)
            ]
        by_name = {name: gradient[None] for name, gradient in zip(names, gradients, strict=True)}
        found.append(sketch(by_name).numpy()[0])
    return np.stack(found)


@pytest.mark.parametrize("form", ["mean", "max", "round_robin", "subspace"])
def test_less_against_one_sample_at_a_time(form: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(less, "DIRECTIONS", 3)
    table = site.scored("less", less=form).table
    assert site.task.query is not None
    pool, query = own_sketches(site, site.task), own_sketches(site, site.task.query)
    cosines = np.array([[reference.cosine(a, b) for b in query] for a in pool])
    if form == "subspace":
        of_length_one = query / np.linalg.norm(query, axis=1, keepdims=True)
        cosines = reference.cosines_within(pool, of_length_one, 3)
    if form == "round_robin":
        found = np.argsort(-table.quality[:ROWS])[: ROWS // 2]
        taken = [cosines[pick, turn % QUERY] for turn, pick in enumerate(found)]
        expected = [cosines[pick, turn % QUERY] for turn, pick in enumerate(reference.in_turn(cosines[:ROWS], 9))]
        np.testing.assert_allclose(taken, expected, atol=1e-3)  # nearly equal ones may change places
    else:
        expected = cosines.mean(1) if form == "mean" else cosines.max(1)
        np.testing.assert_allclose(table.quality, expected, atol=1e-4)


def test_what_was_not_looked_at_is_not_above_what_was(site: Site) -> None:
    """Where the query's rows choose in turn, from a part of the pool, within labels."""
    limited = Site(site.tree | {"scoring": site.tree["scoring"] | {"max_samples": 14}}, site.task, site.module)
    quality = limited.scored("less", less="round_robin", stratify=True, keep_fraction=0.25).table.quality
    values, counts = np.unique(quality, return_counts=True)
    unseen = values[counts.argmax()]
    others = quality[(quality <= 1) & (quality != unseen)]
    assert counts.max() == len(quality) - 14
    assert others.min() <= unseen <= others.max()


def test_picks_stand_above_what_was_not_looked_at(tmp_path: Path, models_dir: Path) -> None:
    """Where there are places for all that was looked at, and no other likeness is left."""
    site = make_site("bert", tmp_path, models_dir, train_on_query=False)
    limited = Site(site.tree | {"scoring": site.tree["scoring"] | {"max_samples": 6}}, site.task, site.module)
    table = limited.scored("less", less="round_robin").table
    values, counts = np.unique(table.quality, return_counts=True)
    assert counts.tolist() == [ROWS - 6] + [1] * 6, "one number for all others, below the picks"
    assert table.selected[np.isin(table.quality, values[1:])].all()
    assert table.selected.sum() == ROWS // 2
    others = np.flatnonzero(table.quality == values[0])
    assert np.flatnonzero(table.selected[others]).tolist() != [0, 1, 2], "not the first ones of the file"


def test_a_part_of_the_pool_is_looked_at(site: Site) -> None:
    limited = Site(site.tree | {"scoring": site.tree["scoring"] | {"max_samples": 8}}, site.task, site.module)
    quality = limited.scored("less").table.quality
    values, counts = np.unique(quality, return_counts=True)
    assert counts.max() == len(quality) - 8
    assert values[counts.argmax()] == pytest.approx(np.delete(quality, quality == values[counts.argmax()]).mean())


def moved(site: Site, steps: int) -> TrainState:
    """A state of the site's optimizer after so many steps, as large as its gradients are."""
    generator = torch.Generator().manual_seed(1)
    params = {}
    for name, parameter in site.module.named_parameters():
        if "lora_" in name:
            noise = torch.randn(2, *parameter.shape, generator=generator)
            params[name] = ParamState(parameter.detach(), noise[0] * 0.01, noise[1].square() * 1e-4)
    return TrainState(params, steps)


def test_adams_steps_against_torch(site: Site) -> None:
    """LESS as published: the pool's gradients through the optimizer, the query's as they are."""
    assert site.task.query is not None
    state = moved(site, 5)
    query = own_sketches(site, site.task.query)
    plain, turned = own_sketches(site, site.task), own_sketches(site, site.task, state)
    table = replace(site, state=state).scored("less", less_gradients="adam").table
    wanted, others = (
        np.array([np.mean([reference.cosine(a, b) for b in query]) for a in pool]) for pool in (turned, plain)
    )
    np.testing.assert_allclose(table.quality, wanted, atol=1e-4)
    assert np.abs(wanted - others).max() > 0.05, "or nothing is shown"


def test_an_optimizer_without_a_step_has_no_moments(site: Site) -> None:
    fresh = replace(site, state=moved(site, 0))
    with pytest.raises(UserError, match=r"less_gradients='adam'.*scoring\.warmup_steps"):
        fresh.scored("less", less_gradients="adam")


@given(
    st.integers(0, 6), st.floats(0.0, 0.99), st.floats(0.5, 0.9999), st.integers(1, 3), st.sampled_from([1e-8, 1e-3]),
    st.integers(0, 99),
)  # fmt: skip
def test_an_update_is_what_a_step_of_torch_changes(
    steps: int, first: float, second: float, batch: int, eps: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    history = [torch.randn(3, 4, generator=generator) for _ in range(steps)]
    gradients = torch.randn(batch, 3, 4, generator=generator)
    state = reference.after_steps_of_torch(history, (first, second), eps)
    moved_there = TrainState({"w": state}, steps)
    for scale in (1.0, 0.25):
        scales = {"w": 0.25} if scale != 1 else None
        update = AdamUpdate(moved_there, betas=(first, second), eps=eps, scales=scales)
        for row, gradient in zip(update("w", gradients), gradients, strict=True):
            expected = scale * reference.step_by_torch(state, steps, gradient, (first, second), eps)
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)
