"""All that the project knows about DeepSpeed: gather, tear down and restore under ZeRO-1/2/3."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tsqlora_scale.engine.numerics import rounded_norm
from tsqlora_scale.engine.train_state import ParamState, TrainState

MOMENTS = ("exp_avg", "exp_avg_sq")
#: Elements of the buckets that gradients are exchanged through, at least and at most: room for the adapter to grow to
#: twice its size, but no more than 400 MB where ranks are high.
BUCKET = (1_000_000, 100_000_000)
#: Closures on a destroyed engine that ``engine.destroy()`` leaves on every module; with them in place the next
#: ZeRO-3 backward fails in the old engine's parameter trace (deepspeed 0.19).
STALE_ATTRIBUTES = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining")


def configure(accelerator: Any, *, micro_batch_size: int, max_grad_norm: float | None, trainable_numel: int) -> None:
    """Fill the DeepSpeed config with what the run decides.

    ``gradient_clipping`` is always set: its default changed between releases. Buckets are sized by the trainable
    parameters (:data:`BUCKET`), not by DeepSpeed's default of 5e8 elements, which would allocate 2 GB for an adapter.
    """
    if accelerator.state.deepspeed_plugin.zero_stage == 3:
        _linear_as_elsewhere()
        _no_gathered_weight_waits()
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    _auto_again(plugin)
    config["train_micro_batch_size_per_gpu"] = micro_batch_size
    config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
    config["train_batch_size"] = micro_batch_size * accelerator.gradient_accumulation_steps * accelerator.num_processes
    config["gradient_clipping"] = max_grad_norm or 0.0
    zero = config["zero_optimization"]
    zero.pop("compute_grad_norm", None)  # without the norm, a step on a gradient that is not finite would be taken
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if zero.get(key, "auto") == "auto":
            zero[key] = bucket_size(trainable_numel)


def bucket_size(trainable_numel: int) -> int:
    """Elements of a bucket where nobody has set one."""
    return min(max(2 * trainable_numel, BUCKET[0]), BUCKET[1])


def _auto_again(plugin: Any) -> None:
    """Make ``auto`` again what was filled in for another model (a proxy) or for other ranks."""
    zero = plugin.deepspeed_config["zero_optimization"]
    if not hasattr(plugin, "tsqlora_auto"):
        plugin.tsqlora_auto = [key for key, value in zero.items() if value == "auto"]
    zero.update(dict.fromkeys(plugin.tsqlora_auto, "auto"))


def _linear_as_elsewhere() -> None:
    """Let ZeRO-3's linear function round as torch's does.

    ZeRO-3 replaces ``torch.nn.functional.linear`` by a function that keeps no gathered weight for the backward pass,
    and that adds the bias after the product instead of with it.
    """
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    LinearFunctionForZeroStage3.forward = staticmethod(torch.ops.aten.linear)


def _no_gathered_weight_waits() -> None:
    """Let 4-bit layers keep their parameter for the backward pass, not a view of it.

    ZeRO-3 empties a parameter after the forward pass and fills it again for the backward pass. bitsandbytes keeps a
    view in between, and with it everything that was gathered: by the end of a forward pass the whole 4-bit base, on
    every rank, checkpointed activations or not.
    """
    functions = sys.modules.get("bitsandbytes.autograd._functions")  # there, if the base has 4-bit layers
    if functions is None or hasattr(functions.MatMul4Bit, "keeps_view"):
        return
    keeps_view = functions.MatMul4Bit.forward

    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        output: torch.Tensor = keeps_view(ctx, inputs, weight, *rest)
        param = weight._base
        if hasattr(param, "ds_id") and getattr(ctx, "tensors", (None, None))[1] is not None:
            ctx.tensors = (None, param)
        return output

    functions.MatMul4Bit.keeps_view = staticmethod(keeps_view)
    functions.MatMul4Bit.forward = staticmethod(forward)


@contextmanager
def preparing(module: nn.Module, *, sends_base: bool) -> Iterator[None]:
    """Around ``prepare``.

    ``deepspeed.initialize`` formats all its arguments, every parameter among them, for a message that it does not
    print; at a rank event that was a third of its time.
    """
    from torch._tensor_str import printoptions  # the public function cannot tell what was set before

    with printoptions(threshold=0, edgeitems=1), nullcontext() if sends_base else _base_stays(module):
        yield


@contextmanager
def _base_stays(module: nn.Module) -> Iterator[None]:
    """Around a second ``prepare`` of the same model: ZeRO-1/2 send only what trains from rank 0 to all ranks.

    ``deepspeed.initialize`` broadcasts every parameter, and no option prevents it. It leaves out those with this mark,
    which DeepSpeed's own LoRA layers put on their frozen base; should it forget the mark, the base is sent, no more.
    ZeRO-3 sends new parameters only.
    """
    frozen: list[Any] = [p for p in module.parameters() if not p.requires_grad]
    for param in frozen:
        param.ds_optim_param = True
    try:
        yield
    finally:
        for param in frozen:
            del param.ds_optim_param


def clip_by_rounded_norm(engine: Any) -> None:
    """See :func:`tsqlora_scale.engine.numerics.rounded_norm`; the norm that is reported keeps its digits.

    DeepSpeed leaves a step out where the norm is not finite, under all types since 0.19.
    """
    clip = engine.optimizer.unscale_and_clip_grads

    def rounded(gradients: Any, norm: torch.Tensor) -> None:
        assert norm.isfinite() and norm >= 0, "DeepSpeed steps on a gradient that is not finite; use a newer one"
        clip(gradients, rounded_norm(norm))

    engine.optimizer.unscale_and_clip_grads = rounded


def shards_while_loading() -> bool:
    """Whether ``from_pretrained`` builds the model under ``zero.Init`` (it then refuses a ``device_map``)."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


@contextmanager
def loading_as(dtype: torch.dtype) -> Iterator[None]:
    """Around ``from_pretrained``: under ZeRO-3 the base's shards are stored in ``dtype``.

    ``zero.Init`` takes the type from DeepSpeed's config alone, where bf16 is off because the factors train in float32.
    """
    from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

    if dtype != torch.bfloat16 or not is_deepspeed_zero3_enabled():
        yield
        return
    config: dict[str, Any] = deepspeed_config()
    before = config.get("bf16")
    config["bf16"] = {"enabled": True}
    try:
        yield
    finally:
        config.pop("bf16") if before is None else config.update({"bf16": before})


def is_sharded(param: Any) -> bool:
    """Whether ZeRO-3 keeps only a part of the parameter on this rank (above the persistence threshold).

    Between its uses, that is: recently used parameters may be whole for a while.
    """
    return hasattr(param, "ds_id") and bool(not param.ds_persist and param.ds_tensor.numel() < param.ds_numel)


def is_in_use(param: Any) -> bool:
    """Whether ZeRO-3 has the parameter whole for a module: inside its pass, and after a backward pass that ends at the
    module, as nothing before it needs a gradient. DeepSpeed's own steps let go of it; it frees no such parameter."""
    return bool(getattr(param, "ds_active_sub_modules", ()))


def held_part(param: Any) -> torch.Tensor:
    """What this rank holds of a parameter between its uses: its shard (of one rank: the whole), or all of it."""
    part: torch.Tensor = param.ds_tensor if hasattr(param, "ds_id") and not param.ds_persist else param.data
    return part


def gather(engine: Any, params: Mapping[str, nn.Parameter]) -> TrainState:
    """Parameters with their moments, whole, on every rank. A collective.

    Args:
        params: those that train since ``prepare``, by name, sorted.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state = TrainState(optimizer_steps=_optimizer_steps(engine))
    for name, param in params.items():
        value = safe_get_full_fp32_param(param).detach().float().cpu().clone()
        entry = ParamState.fresh(value)
        if state.optimizer_steps:
            for key in MOMENTS:
                moment = safe_get_full_optimizer_state(param, key)
                setattr(entry, key, moment.detach().float().cpu().reshape(value.shape).clone())
        state.params[name] = entry
    return state


def unlike(params: Mapping[str, nn.Parameter], state: TrainState) -> list[str]:
    """What this rank holds for itself, its shards and what it computes with, and ``state`` has otherwise."""
    found = []
    for name, param in params.items():
        entry = state.params.get(name)
        if entry is None:
            found.append(f"value of {name}")
            continue
        for part in ("value", *(MOMENTS if state.optimizer_steps else ())):
            if not all(_same(held, getattr(entry, part), start) for held, start in _parts(param, part)):
                found.append(f"{part} of {name}")
    return found


def _parts(param: Any, part: str) -> Iterator[tuple[torch.Tensor, int]]:
    """Flat pieces of a parameter's value or moment that lie on this rank, each with its place in the whole."""
    key = None if part == "value" else part
    if hasattr(param, "ds_id"):
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        start = dist.get_rank() * param.ds_tensor.numel()
        if key is None:
            yield param.ds_tensor.detach(), start
            yield safe_get_local_fp32_param(param), start
        else:
            yield safe_get_local_optimizer_state(param, key), start
        return
    if key is None:
        yield param.detach(), 0
    if param._hp_mapping is not None:  # no part of the parameter is this rank's
        yield param._hp_mapping.get_hp_fragment(key), param._hp_mapping.lp_fragment_address.start


def _same(held: torch.Tensor, whole: torch.Tensor, start: int) -> bool:
    """Whether a piece, padded at its end perhaps, is that of the whole."""
    wanted = whole.flatten()[start : start + held.numel()]
    return torch.equal(held.detach().float().cpu().flatten()[: wanted.numel()], wanted)


def restore_moments(engine: Any, state: TrainState) -> None:
    """Give a freshly prepared engine the moments and the step count of ``state``; values are already in the module.

    Optimizer state is lazy after ``prepare``: it is filled in first, for Adam-type optimizers.
    """
    zero_optimizer = engine.optimizer
    inner = zero_optimizer.optimizer
    # ZeRO-1/2 step one group after the other, and link the state of all of them to their parameters after the first
    # one's first step, when the others have none yet: of several groups it has to be there before
    links_too_early = len(inner.param_groups) > 1 and hasattr(zero_optimizer, "_lazy_init_hp_params_optimizer_state")
    if not state.optimizer_steps and not links_too_early:
        return
    for flat in _flat_partitions(zero_optimizer):
        step: Any = torch.tensor(float(state.optimizer_steps))
        if type(inner).__name__ == "DeepSpeedCPUAdam":  # the one optimizer here whose step is a plain int
            step = state.optimizer_steps
        inner.state[flat] = {
            "step": step,
            "exp_avg": torch.zeros_like(flat.data),
            "exp_avg_sq": torch.zeros_like(flat.data),
        }
    if hasattr(zero_optimizer, "_lazy_init_hp_params_optimizer_state"):
        zero_optimizer._lazy_init_hp_params_optimizer_state()  # ZeRO-1/2: link the slices to their parameters
    if not state.optimizer_steps:
        return
    for name, param in sorted(engine.module.named_parameters()):
        if param.requires_grad:
            for key in MOMENTS:
                _set_moment(param, getattr(state.params[name], key), key)


def _set_moment(param: Any, value: torch.Tensor, key: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not hasattr(param, "ds_id"):
        safe_set_full_optimizer_state(param, value.to(param.device), key)
        return
    # ZeRO-3's setter of whole tensors fails where the world size does not divide the size: set the padded shard.
    shard = param.ds_tensor.numel()
    world, rank = dist.get_world_size(), dist.get_rank()
    padded = torch.zeros(shard * world)
    padded[: value.numel()] = value.flatten()
    safe_set_local_optimizer_state(param, padded[rank * shard : (rank + 1) * shard].to(param.device), key)


def _flat_partitions(zero_optimizer: Any) -> list[torch.Tensor]:
    """The flat float32 tensors that the inner optimizer steps: one per group (ZeRO-1/2) or sub-group (ZeRO-3)."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(zero_optimizer, attribute):
            return list(getattr(zero_optimizer, attribute))
    raise AssertionError(f"unknown ZeRO optimizer {type(zero_optimizer).__name__}")


def _optimizer_steps(engine: Any) -> int:
    for flat in _flat_partitions(engine.optimizer):
        entry = engine.optimizer.optimizer.state.get(flat, {})
        if "step" in entry:
            return int(entry["step"])
    return 0


def release(accelerator: Any, engine: Any, optimizer: Any) -> None:
    """Destroy the engine and everything that it left on the module, so that ``prepare`` can be called again."""
    module = engine.module
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        if hook is not None:
            hook.remove()  # destroy() leaves these two, and each rebuild would add two more
    accelerator.free_memory(engine, optimizer)
    for submodule in module.modules():
        for name in STALE_ATTRIBUTES:
            submodule.__dict__.pop(name, None)
    _forget_in_caches()
    gc.collect()


def forget_replaced(module: nn.Module) -> None:
    """Before a second ``prepare``: drop what modules note about parameters that are no longer the model's.

    ZeRO-3 notes on a module every parameter that it uses and another module owns (LoRA factors on PEFT's layers). A
    replaced factor would stay there with its destroyed engine, and would still be gathered for that module.
    """
    present = {id(param) for param in module.parameters()}
    for submodule in module.modules():
        noted: dict[int, Any] = submodule.__dict__.get("_external_params", {})
        for key in [key for key, param in noted.items() if id(param) not in present]:
            del noted[key]


def _forget_in_caches() -> None:
    """Empty the cache of ZeRO-3's coordinator: it belongs to the class, its keys hold every coordinator that ever was,
    and so every destroyed engine with its buffers and its parameters' shards (deepspeed 0.19)."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    for method in vars(PartitionedParameterCoordinator).values():
        # the cached function lies inside of a decorator that does not say what it wraps
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()
