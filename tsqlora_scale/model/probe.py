"""One pass of a few tokens through a copy of the model: its structure, with random weights in the place of its own.

Five things that only a forward and a backward pass can tell are known before anything is loaded: whether a token sees
those after it, which linear layers text never passes through on its way to the logits, which of them never get the
batch as their first dimension, whether a row's answer depends on the padding beside it, and whether texts that stand
end to end in a row are kept apart. The copy takes next to no memory: all of its large weights are windows of one
random vector, and large products are products of low rank. None of the questions depends on what the weights are.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.quiet import quiet_libraries
from tsqlora_scale.model.dropouts import set_dropout
from tsqlora_scale.model.linear_layers import expert_kind, linear_layers
from tsqlora_scale.tasks.packing import Packing, known_samples

if TYPE_CHECKING:
    from tsqlora_scale.tasks import Task

log = logging.getLogger(__name__)

#: Tokens of the probe's one text.
LENGTH = 12
#: Elements of a model that gets weights of its own, and of a weight that always does.
SMALL_MODEL, SMALL_WEIGHT = 2**24, 2**16
#: The rank of a large product.
RANK = 8
#: Share of what a changed token changes at its own position, above which a change before it is not rounding.
LEAK = 1e-4
#: Share of the largest logit that padding changes, above which that is not rounding.
BY_PADS = 1e-3
#: Texts that are laid end to end.
LAID = 3
#: Rows among which a short and a long one are looked for, and the tokens that they are cut to.
ROWS, LONGEST = 16, 48


@dataclass(frozen=True)
class Probe:
    """What a pass has shown.

    Attributes:
        sees_ahead: whether logits depend on later tokens of the text that is generated; None: it could not be run.
        unreached: linear layers that the logits do not depend on; empty where it could not be run.
        without_batch: linear layers whose inputs have another first dimension than the batch in every call: LED's
            attention has time there, experts take tokens of all rows. Their sizes may be the batch's by chance.
        reads_pads: whether the logits of a row depend on the padding beside it; None: not asked, or could not be run.
        packs: whether those of a text are the same where others stand before it in a row; likewise.
        idle: parameters that no logit depends on; empty unless asked for.
        failure: what the model's code raised, in a line; None where it could be run.
        is_sure: whether the run's own forward would raise it, too: the copy's weights were no windows.
    """

    sees_ahead: bool | None = None
    unreached: frozenset[str] = frozenset()
    without_batch: frozenset[str] = frozenset()
    reads_pads: bool | None = None
    packs: bool | None = None
    idle: frozenset[str] = frozenset()
    failure: str | None = None
    is_sure: bool = False


@dataclass(frozen=True)
class PaddedRows:
    """A model's inputs of a row alone, (1, t), and among others that are longer, (B, T).

    Attributes:
        row: its place among them.
    """

    alone: Mapping[str, Tensor]
    among: Mapping[str, Tensor]
    row: int


@dataclass(frozen=True)
class PackedTexts:
    """A model's inputs of some texts alone, (1, t) each, and end to end in one row."""

    alone: list[Mapping[str, Tensor]]
    together: Packing

    def to(self, device: torch.device | str) -> PackedTexts:
        """The same on ``device``."""
        alone = [{name: tensor.to(device) for name, tensor in inputs.items()} for inputs in self.alone]
        return PackedTexts(list(alone), self.together.each(lambda tensor: tensor.to(device)))


def run_probe(
    auto_class: Any,
    model_config: Any,
    inputs: Mapping[str, Tensor],
    *,
    padded: PaddedRows | None = None,
    packed: PackedTexts | None = None,
    trust_remote_code: bool = False,
    finds_idle: bool = False,
    **options: Any,
) -> Probe:
    """Run the copy, on the CPU. What cannot be run (kernels that need a GPU) tells only why.

    Args:
        inputs: of a batch of one, as the model is trained on them: (1, T) token ids, masks, decoder's ids.
        padded: rows to ask by whether padding is read.
        packed: texts to ask by whether they are kept apart.
        options: more of ``from_config``.
        finds_idle: whether to look for parameters that no logit depends on.
    """
    model, mode = None, None
    try:
        with quiet_libraries(), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            model, mode = random_copy(auto_class, model_config, trust_remote_code, **options)
            with mode:
                found = Probe(_sees_ahead(model, inputs), _unreached(model, inputs))
                if finds_idle:
                    found = replace(found, idle=_idle(model, inputs))
                with suppress(Exception):  # what only more or longer rows bring up takes nothing from the rest
                    found = replace(found, without_batch=_without_batch(model, inputs))
                    found = replace(found, reads_pads=None if padded is None else reads_pads(model, padded))
                with suppress(Exception):
                    found = replace(found, packs=None if packed is None else keeps_apart(model, packed, most=BY_PADS))
                return found
    except Exception as error:  # of whatever a model's code does
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        log.debug("the model cannot be tried out (%s)", reason)
        if model is not None and mode is not None and _runs(model, inputs, mode):
            return Probe()  # other tokens than the sample's are no texts to it: BART counts its end tokens
        return Probe(failure=reason, is_sure=model is not None and is_small(model))


def _runs(model: nn.Module, inputs: Mapping[str, Tensor], mode: Any) -> bool:
    """Whether the model takes the sample as it is."""
    try:
        with quiet_libraries(), torch.no_grad(), mode:
            model.eval()(**inputs)
    except Exception:
        return False
    return True


def probe_inputs(task: Task) -> dict[str, Tensor]:
    """The model's inputs of the pool's first sample, (1, T) each, as short as the task makes them.

    What writes text needs no whole sample; what judges one may look for the tokens at its ends.
    """
    try:
        inputs = task.batch([0], max_length=LENGTH).inputs
    except UserError:  # a chat template that is longer
        inputs = task.batch([0]).inputs
    if task.peft_task_type == "SEQ_CLS":
        return dict(inputs)
    return {name: tensor[:, :LENGTH] if tensor.dim() > 1 else tensor for name, tensor in inputs.items()}


def padded_rows(task: Task) -> PaddedRows | None:
    """The shortest of the pool's first rows, alone and beside the longest; None where nothing is padded."""
    rows = range(min(ROWS, len(task)))
    # cut to a few tokens, all may be as long as that; whole ones are for a few logits a row alone
    for limit in (LONGEST, None) if task.peft_task_type == "SEQ_CLS" else (LONGEST,):
        with suppress(UserError):  # rows are checked elsewhere, and a template may be longer
            alone = [task.batch([row], max_length=limit).inputs for row in rows]
            lengths = [inputs["input_ids"].shape[1] for inputs in alone]
            short, long = lengths.index(min(lengths)), lengths.index(max(lengths))
            if lengths[short] < lengths[long]:
                return PaddedRows(alone[short], task.batch([short, long], max_length=limit).inputs, row=0)
    return None


def packed_texts(task: Task) -> PackedTexts:
    """The pool's first texts, alone and end to end; where there is one alone, after itself."""
    rows = [number % len(task) for number in range(LAID)]
    try:
        limit: int | None = LONGEST
        batch = task.batch(rows, max_length=limit)
    except UserError:  # a chat template that is longer
        limit = None
        batch = task.batch(rows)
    assert task.packer is not None
    assert batch.places is not None, "the packer sees to it"
    alone = [task.batch([row], max_length=limit).inputs for row in rows]
    return PackedTexts(list(alone), task.packer.laid(batch.inputs, batch.places, [range(LAID)]))


def random_copy(
    auto_class: Any, model_config: Any, trust_remote_code: bool, **options: Any
) -> tuple[nn.Module, TorchFunctionMode]:
    """A model on the CPU whose weights are random, small ones their own, and the mode to run it in."""
    from accelerate import init_empty_weights

    config = copy.deepcopy(model_config)
    set_dropout(config, 0.0)
    config.use_cache = False
    with init_empty_weights(include_buffers=False):
        model: Any = auto_class.from_config(config, trust_remote_code=trust_remote_code, **options)
    small = is_small(model)
    if not small and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # others multiply by all experts at once
    fill_with_windows(model, own=small)
    return model, LowRankProducts()


def is_small(model: nn.Module) -> bool:
    """Whether the copy of a model has weights of its own."""
    return sum(param.numel() for param in model.parameters()) <= SMALL_MODEL


def fill_with_windows(model: nn.Module, *, own: bool) -> None:
    """Give every parameter on the meta device values: random ones of its own, or a window of one random vector.

    Matrices have a standard deviation of 1 / sqrt(columns), vectors are near 1 (weights) or 0 (biases).

    Args:
        own: no windows: every parameter has memory of its own.
    """
    longest = max(sum(param.shape) for param in model.parameters())
    vector = torch.randn(longest + 8192)
    filled: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if id(param) not in filled:
                filled[id(param)] = nn.Parameter(_values(param, name, vector, own, len(filled)), requires_grad=False)
            module._parameters[name] = filled[id(param)]


def _values(param: nn.Parameter, name: str, vector: Tensor, own: bool, number: int) -> Tensor:
    shape = param.shape
    if len(shape) < 2:
        return torch.randn(shape) * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    scale = 1 / math.sqrt(max(shape[-1], 1))
    if own or param.numel() <= SMALL_WEIGHT:
        return torch.randn(shape) * scale
    offset = number * 61 % 8191
    return (vector[offset : offset + sum(shape)] * scale).as_strided(shape, (1,) * len(shape))


class LowRankProducts(TorchFunctionMode):
    """Within, ``linear`` with a window for a weight multiplies by matrices of rank :data:`RANK` instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function, or its cheap stand-in."""
        kwargs = kwargs or {}
        if func is nn.functional.linear and not kwargs and len(args) in (2, 3):
            x, weight, *bias = args
            if weight.dim() == 2 and weight.stride() == (1, 1) and weight.numel() > SMALL_WEIGHT:
                rank = min(RANK, *weight.shape)
                outer, inner = weight[:, :rank].clone(), weight[:rank].clone()
                out = (x @ inner.T) @ outer.T * math.sqrt(weight.shape[1] / rank)
                return out + bias[0] if bias and bias[0] is not None else out
        return func(*args, **kwargs)


def _sees_ahead(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool | None:
    """Whether changing the last token changes the logits before it."""
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    ids = inputs[key]
    if ids.shape[1] < 2:
        return None
    both = {name: tensor.repeat(2, *(1,) * (tensor.dim() - 1)) for name, tensor in inputs.items()}
    others = ids[ids != ids[0, -1]]
    both[key][1, -1] = int(others[-1]) if len(others) else int(ids[0, -1]) - 1 if ids[0, -1] else 1
    model.eval()
    with torch.no_grad():
        logits = model(**both).logits
    if logits.dim() != 3 or logits.shape[1] != ids.shape[1]:
        return None
    change = (logits[0] - logits[1]).abs().amax(-1)
    if not change.isfinite().all() or change[-1] == 0:
        return None
    return bool(change[:-1].max() > LEAK * change[-1])


def reads_pads(model: nn.Module, padded: PaddedRows) -> bool:
    """Whether the logits of a row depend on the padding beside it."""
    model.eval()
    with torch.no_grad():
        alone, among = model(**padded.alone).logits[0].float(), model(**padded.among).logits[padded.row].float()
    among = among[: len(alone)] if alone.dim() > 1 else among  # a decoder's rows are padded on the right
    change = (alone - among).abs().max()
    return bool(change.isfinite() and change > BY_PADS * torch.stack([alone, among]).abs().max())


def keeps_apart(model: Any, texts: PackedTexts, *, most: float) -> bool:
    """Whether logits of texts that stand end to end are those that each has alone.

    Args:
        model: in evaluation mode, or it is put there.
        most: share of the largest logit by which they may differ.
    """
    model.eval()
    with torch.no_grad(), known_samples(texts.together):
        together = model(**texts.together.inputs).logits[0].float()
        alone = torch.cat([model(**inputs).logits[0].float() for inputs in texts.alone])
    change = (together[: len(alone)] - alone).abs().max()
    return bool(change.isfinite() and change <= most * alone.abs().max())


def _unreached(model: nn.Module, inputs: Mapping[str, Tensor]) -> frozenset[str]:
    """Linear layers that are not called, or whose outputs do not reach the logits."""
    layers = linear_layers(model)
    anchors = {name: torch.zeros((), requires_grad=True) for name in layers}
    model.train()
    with _anchored(layers, anchors):
        logits = model(**inputs).logits
    found = torch.autograd.grad(logits.float().sum(), list(anchors.values()), allow_unused=True)
    reached = {expert_kind(name) for name, gradient in zip(anchors, found, strict=True) if gradient is not None}
    return frozenset(name for name in layers if expert_kind(name) not in reached)


def _idle(model: nn.Module, inputs: Mapping[str, Tensor]) -> frozenset[str]:
    """Parameters that are not in the graph of the logits: it is walked, and no gradient is computed."""
    model.tie_weights()  # type: ignore[operator]  # the copy was made without weights, which lets go of ties
    params = {name: param for name, param in model.named_parameters() if param.is_floating_point()}
    try:
        for param in params.values():
            param.requires_grad_(True)
        start = model.train()(**inputs).logits.grad_fn
        seen, left, reached = {start}, [start], set()
        while left:
            node = left.pop()
            if hasattr(node, "variable"):
                reached.add(id(node.variable))
            left += [after for after, _ in node.next_functions if after is not None and after not in seen]
            seen.update(left)
    finally:
        for param in params.values():
            param.requires_grad_(False)
    kinds = {expert_kind(name) for name, param in params.items() if id(param) in reached}
    return frozenset(name for name in params if expert_kind(name) not in kinds)


def _without_batch(model: nn.Module, inputs: Mapping[str, Tensor]) -> frozenset[str]:
    """Linear layers that are called, and never with the batch's dimension first."""
    lengths = {tensor.shape[1] for tensor in inputs.values() if tensor.dim() > 1}
    rows = next(count for count in range(2, 2 + LENGTH) if count not in lengths)
    batch = {name: tensor.repeat(rows, *(1,) * (tensor.dim() - 1)) for name, tensor in inputs.items()}
    layers = linear_layers(model)
    found: dict[bool, set[str]] = {True: set(), False: set()}

    def listener(name: str) -> Callable[..., None]:
        return lambda _, args, __: found[args[0].dim() > 1 and args[0].shape[0] == rows].add(expert_kind(name))

    handles = [module.register_forward_hook(listener(name)) for name, module in layers.items()]
    try:
        with torch.no_grad():
            model.eval()(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(name for name in layers if expert_kind(name) in found[False] - found[True])


@contextmanager
def _anchored(layers: Mapping[str, nn.Module], anchors: Mapping[str, Tensor]) -> Iterator[None]:
    def add(anchor: Tensor) -> Callable[..., Any]:
        # a router that gives several things (PhiMoE's) is no place for an adapter
        return lambda _module, _inputs, output: output + anchor if isinstance(output, Tensor) else output

    handles = [module.register_forward_hook(add(anchors[name])) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
