"""Drop and append whole components of one layer, with their Adam moments: for policies that choose components, and for
adapters of triplets B diag(E) A.

What stays is copied as it is, value and moments. New components change nothing: of two factors B is zero, as in
:mod:`.resize`; of triplets E is, while A and B both point where nothing points yet, as a zero in E with a zero in B
would never get a gradient. Their second moments are the mean over those that stay, for the reason given there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from tsqlora_scale.engine.train_state import ParamState
from tsqlora_scale.model.adapters.svd import INITIAL_STD
from tsqlora_scale.ranks.resize import INITIAL_ROW_NORM, GrowInit, component_importance, directions, product_norm, ratio

#: A (r, d_in), B (d_out, r) and, of triplets, E (r,).
Triplets = tuple[ParamState, ParamState, ParamState | None]


def most_important(a: ParamState, b: ParamState, e: ParamState | None, rank: int) -> tuple[int, ...]:
    """The ``rank`` components of the largest :func:`~.resize.component_importance`, E's |E * dE| counted in, ascending;
    ties go to the earlier one."""
    importance = component_importance(a, b)
    if e is not None:
        importance = importance + (e.value.double() * e.exp_avg.double()).abs()
    order = torch.argsort(importance, descending=True, stable=True)
    return tuple(sorted(order[:rank].tolist()))


def rearrange(
    a: ParamState,
    b: ParamState,
    e: ParamState | None,
    keep: Sequence[int],
    rank: int,
    *,
    grow_init: GrowInit,
    generator: torch.Generator,
    usual_sq: tuple[float, ...] = (0.0, 0.0, 0.0),
    sketch: Tensor | None = None,
) -> tuple[Triplets, float]:
    """The components of ``keep``, then new ones up to ``rank``.

    Args:
        a: factor A, (r, d_in), float32 on the CPU; likewise B, (d_out, r), and E, (r,), if there is one.
        keep: which of the r stay, ascending.
        rank: of the new layer, at least as many.
        grow_init: where new rows of A point, see :func:`~.resize.resize_layer`.
        generator: the only source of randomness.
        usual_sq: second moments of A, B and E for the new components of a layer that keeps none and had none.
        sketch: (k, d_in), rows of about the row space of the weight's gradient.

    Returns:
        The new parameters, and ||dW - dW'||_F / ||dW||_F (0 when dW was zero).
    """
    chosen = torch.tensor(list(keep), dtype=torch.long)
    count = rank - len(chosen)
    assert count >= 0, (rank, keep)
    rows = [_Rows.from_state(a), _Rows.from_state(b, transposed=True)] + (
        [_Rows.from_state(e)] if e is not None else []
    )
    error = _loss_of(rows, chosen)
    stay = [part.take(chosen) for part in rows]
    if count:
        fresh = _fresh(rows, stay, count, grow_init, generator, sketch)
        template = stay if len(chosen) else rows
        stay = [
            part.extend(value, like, usual)
            for part, value, like, usual in zip(stay, fresh, template, usual_sq, strict=False)
        ]
    new_a, new_b = stay[0].state(), stay[1].state(transposed=True)
    return (new_a, new_b, stay[2].state() if e is not None else None), error


class _Rows:
    """A parameter's value and moments with one row a component: (r, d), or (r,)."""

    def __init__(self, value: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        self.value, self.exp_avg, self.exp_avg_sq = value, exp_avg, exp_avg_sq

    @classmethod
    def from_state(cls, state: ParamState, *, transposed: bool = False) -> _Rows:
        parts = (state.value, state.exp_avg, state.exp_avg_sq)
        return cls(*(part.T if transposed else part for part in parts))

    def take(self, chosen: Tensor) -> _Rows:
        return _Rows(self.value[chosen], self.exp_avg[chosen], self.exp_avg_sq[chosen])

    def extend(self, value: Tensor, template: _Rows, usual_sq: float) -> _Rows:
        """New rows of these values, without a first moment, their second one the mean over rows of ``template``."""
        nothing = torch.zeros_like(value)
        usual = template.exp_avg_sq.mean(0) if len(template.exp_avg_sq) else torch.tensor(usual_sq)
        pairs = ((self.value, value), (self.exp_avg, nothing), (self.exp_avg_sq, usual.expand_as(value).float()))
        return _Rows(*(torch.cat(pair) for pair in pairs))

    def state(self, *, transposed: bool = False) -> ParamState:
        parts = (self.value, self.exp_avg, self.exp_avg_sq)
        assert all(bool(part.isfinite().all()) for part in parts)
        return ParamState(*((part.T if transposed else part).contiguous().clone() for part in parts))


def _loss_of(rows: list[_Rows], chosen: Tensor) -> float:
    """||dW - dW'||_F / ||dW||_F of a layer that keeps ``chosen`` alone."""
    a, b = rows[0].value.double(), rows[1].value.double()
    if len(rows) == 3:
        b = b * rows[2].value.double()[:, None]
    lost = torch.ones(len(a), dtype=torch.bool)
    lost[chosen] = False
    if not bool(lost.any()):
        return 0.0
    return ratio(product_norm(a[lost], b[lost]), product_norm(a, b))


def _fresh(
    rows: list[_Rows],
    stay: list[_Rows],
    count: int,
    init: GrowInit,
    generator: torch.Generator,
    sketch: Tensor | None,
) -> list[Tensor]:
    """Values of ``count`` new components, float32: where what stays does not point, as long as the layer's rows are."""
    triplets = len(rows) == 3
    found = []
    for side in (0, 1):
        old = (stay if len(stay[0].value) else rows)[side].value.double()
        kept = stay[side].value.double()
        if side == 1 and not triplets:
            found.append(torch.zeros(count, kept.shape[1]))
            continue
        wanted = sketch.double() if side == 0 and init == "gradient" and sketch is not None else kept[:0]
        usual = INITIAL_STD * kept.shape[1] ** 0.5 if triplets else INITIAL_ROW_NORM
        norm = float(vector_norm(old, dim=1).mean()) if len(old) else usual
        found.append((norm or usual) * directions(kept, count, init, generator, wanted))
    return [part.float() for part in found] + ([torch.zeros(count)] if triplets else [])
