"""Small LoRA layers with a history, and what is compared of them."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from tsqlora_scale.common.random_streams import layer_generator
from tsqlora_scale.engine.train_state import ParamState
from tsqlora_scale.ranks.resize import Resized, resize_layer


def factors(r: int, d_in: int, d_out: int, seed: int = 0) -> tuple[ParamState, ParamState]:
    """Random factors with moments of ordinary sizes."""
    generator = torch.Generator().manual_seed(seed)

    def state(*shape: int) -> ParamState:
        value, avg, sq = (torch.randn(*shape, generator=generator) for _ in range(3))
        return ParamState(0.1 * value, 1e-3 * avg, 1e-6 * sq.square())

    return state(r, d_in), state(d_out, r)


def resize(a: ParamState, b: ParamState, rank: int, shrink="svd", grow_init="orthogonal", **kwargs) -> Resized:
    kwargs.setdefault("generator", layer_generator(0, 0, "test"))
    return resize_layer(a, b, rank, shrink=shrink, grow_init=grow_init, **kwargs)


def product(a: ParamState, b: ParamState) -> Tensor:
    return b.value.double() @ a.value.double()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


SHAPES = st.tuples(st.integers(2, 9), st.integers(6, 20), st.integers(6, 20))
