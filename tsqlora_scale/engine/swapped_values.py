"""Other values in a model's parameters for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from tsqlora_scale.engine.sharded import read_parameter, write_parameter


@contextmanager
def holding(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, parameters of ``module`` have other values, and afterwards their own again, to the bit. On entering and
    on leaving a collective where they are sharded; an optimizer's own copies of them are left alone.

    After an error they stay as they are: the run is over, and ranks that have none would wait in the collective.

    Args:
        module: bare, not an engine's wrapper; no gradient is to flow through it meanwhile.
        values: full, by parameter name; shapes are those of the parameters.
    """
    params = dict(module.named_parameters())
    own = {name: read_parameter(params[name]) for name in sorted(values)}
    for name in own:
        write_parameter(params[name], values[name])
    yield
    for name, value in own.items():
        write_parameter(params[name], value)
