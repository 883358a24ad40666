"""All that the project knows about FSDP2: which weights it shards, what it holds, and what its passes gather.

Accelerate's ``prepare`` is not used for it: it shards whatever trains along with the base, once. A factor that a rank
event makes later would be in no group, and a second ``prepare`` returns a model that has been sharded as it is. Here
torch's ``fully_shard`` takes the frozen base alone, and what trains is none of its affairs.

The unit is the layer that owns a weight, as under ZeRO-3, not the decoder block: a block's backward pass may be over
before a gradient of one of its layers arrives (DeBERTa applies its key layer to positions, too, which need no
gradient), and whoever listens there needs that layer's weight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.engine.launcher_settings import FsdpSettings
from tsqlora_scale.engine.own_memory import leave_file


def is_sharded_module(module: nn.Module) -> bool:
    """Whether FSDP2 holds something of the module itself, or of all below it. Imports nothing."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_sharded(param: Any) -> bool:
    """Whether FSDP2 keeps only a part of the parameter on this rank now."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(param, tensors.DTensor)


def held_part(param: Any) -> torch.Tensor:
    """This rank's rows of a sharded parameter; may be none."""
    part: torch.Tensor = param.detach().to_local()
    return part


def whole(param: Any) -> torch.Tensor:
    """A copy of a sharded parameter's whole value. A collective."""
    value: torch.Tensor = param.detach().full_tensor().clone()
    return value


def write(param: Any, value: torch.Tensor) -> None:
    """Set a sharded parameter; rank 0's ``value`` wins. A collective."""
    from torch.distributed.tensor import distribute_tensor

    shards = distribute_tensor(value.to(param.device, param.dtype), param.device_mesh, param.placements)
    param.detach().to_local().copy_(shards.to_local())


def shard(module: nn.Module, *, settings: FsdpSettings, device: torch.device) -> None:
    """Shard the frozen weights of ``module`` over all ranks, in place, layer by layer: the device never holds all of
    them. Everything else moves to ``device``. What has been sharded before stays so. A collective.

    Whole on every rank stay what trains, weights below the launcher's size, those that several layers share (a unit
    has one layer), and embeddings other than of the input (DeBERTa reads those of its positions without a call).

    Raises:
        UserError: torch is too old, or packed weights are stored as integers.
    """
    if is_sharded_module(module):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7):
        raise UserError(f"FSDP2 beside an adapter needs torch 2.7, not {torch.__version__}; upgrade it, or use ZeRO-3")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    units = _units(module, settings.whole_below)
    everything = set(module.parameters())
    for unit, params in units:
        unit.register_forward_hook(_not_in_place)
        fully_shard(
            unit,
            mesh=mesh,
            reshard_after_forward=settings.reshard_after_forward,
            ignored_params=everything - set(params),
        )
    # a root of them all, for one set of streams, and one order in which gathers are made ahead in a backward pass
    left = {param for param in module.parameters() if not is_sharded(param)}
    for param in left:
        param.data = param.data.to(device)
    leave_file(module, left)
    fully_shard(module, mesh=mesh, ignored_params=left)
    _become_root(module)


class _Guarded(torch.autograd.Function):
    """Identity; autograd raises where somebody changes what it gives in place."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def _not_in_place(_module: nn.Module, _inputs: Any, out: Any) -> Any:
    """Linear layers give views, and a view that is changed in place (``x += y``) loses FSDP2's hook without a word: the
    layer's weight is not gathered for the backward pass."""
    if isinstance(out, torch.Tensor) and out.requires_grad and out._is_view():
        return _Guarded.apply(out)  # type: ignore[no-untyped-call]
    return out


def _become_root(module: nn.Module) -> None:
    """Else the first layer that runs alone (an encoder that ``generate`` calls) would be the root, and the run end."""
    _state(module)._lazy_init()


def _state(module: Any) -> Any:
    found: Any = module._get_fsdp_state()
    return found


def _units(module: nn.Module, whole_below: int) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules with frozen parameters of their own that are to be sharded, and these; children before parents."""
    owners: dict[int, int] = {}
    for _, part in module.named_modules():
        for param in part.parameters(recurse=False):
            owners[id(param)] = owners.get(id(param), 0) + 1
    inputs = _input_embeddings(module)
    found = []
    for name, part in reversed(list(module.named_modules())):
        if isinstance(part, nn.Embedding) and part not in inputs:
            continue
        params = [
            param
            for param in part.parameters(recurse=False)
            if not param.requires_grad and owners[id(param)] == 1 and param.dim() and param.numel() >= whole_below
        ]
        if any(not param.is_floating_point() for param in params):
            raise UserError(
                f"{name}: its 4-bit weights are stored as {params[0].dtype}, which FSDP2 does not shard; "
                "set model.quant_storage to fp32 or bf16, or use ZeRO or DDP"
            )
        if params:
            found.append((part, params))
    return found


def _input_embeddings(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    part: Any
    for part in module.modules():
        if hasattr(part, "get_input_embeddings"):
            try:
                found.append(part.get_input_embeddings())
            except (NotImplementedError, AttributeError):  # of models that have none
                continue
    return found


class _Gather:
    """One gather, of the parameters of one group."""

    def __init__(self, params: list[Any]) -> None:
        self.params = params

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Gather) and self.params is other.params

    __hash__ = None  # type: ignore[assignment]


class Gathers:
    """The gathers of passes through a sharded model, so that a rank that has left a pass can make the rest of them.

    They are heard where all of them are made, those of a repetition and those ahead of time included.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @contextmanager
    def noted(self, done: list[Any], entered: Callable[[bool], None]) -> Iterator[None]:
        """Within, every gather's group of parameters is put into ``done`` once it is made.

        Args:
            entered: told True before a gather, and False after it.
        """
        from torch.distributed.fsdp._fully_shard import _fsdp_param_group

        of_groups: Any = _fsdp_param_group
        # what is gathered ahead follows from the passes since the last backward; passes of one kind are to be alike
        self._forget_order()
        original = of_groups.foreach_all_gather

        def gather(params: Any, *rest: Any) -> Any:
            entered(True)
            result = original(params, *rest)
            entered(False)
            done.append(_Gather(params))
            return result

        of_groups.foreach_all_gather = gather
        try:
            yield
        finally:
            of_groups.foreach_all_gather = original

    def catch_up(self, rest: list[Any]) -> None:
        """Make the gathers that are left, keeping nothing, and leave the model as between passes. A collective."""
        states = self._states()
        groups = [group for state in states for group in state._fsdp_param_groups]
        self._forget_pass(states, groups)
        self._forget_order()
        for gather in rest:
            group = next(group for group in groups if group.fsdp_params is gather.params)
            group.unshard()
            group.wait_for_unshard()
            group.reshard()

    def _forget_order(self) -> None:
        states = self._states()
        states[0]._comm_ctx.post_forward_order.clear()
        for state in states:
            for group in state._fsdp_param_groups:
                group._post_forward_indices.clear()

    def _states(self) -> list[Any]:
        return list(_state(self._module)._state_ctx.all_states)

    @staticmethod
    def _forget_pass(states: list[Any], groups: list[Any]) -> None:
        idle = type(states[0]._training_state).IDLE
        for group in groups:
            if group._all_gather_result is not None:  # made ahead, and not yet waited for
                group.wait_for_unshard()
            group._training_state = idle
            group.reshard()
        for state in states:
            state._training_state = idle
            state._modules_to_run_forward.clear()
        context = states[0]._state_ctx
        context.iter_forward_root = None
        context.post_backward_final_callback_queued = False
        states[0]._comm_ctx.all_gather_state = None
