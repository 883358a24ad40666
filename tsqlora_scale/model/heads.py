"""The head of a model with labels: which modules it is, and how that of a fine-tuned checkpoint becomes the task's."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.common.printing import printable
from tsqlora_scale.engine.sharded import read_parameter, write_parameter
from tsqlora_scale.tasks.target_scale import TargetScale

log = logging.getLogger("tsqlora_scale")

#: PEFT's names of the tasks whose models end in a head of their own.
_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
#: Heads of models that do not say which of their modules is the body.
_KNOWN = ("classifier", "score", "classification_head", "pre_classifier", "pooler", "sequence_summary", "logits_proj")


def has_head(peft_task_type: str | None) -> bool:
    """Whether models of a task end in a head that is trained whole."""
    return peft_task_type in _WITH_HEAD


def head_modules(model: nn.Module) -> list[str]:
    """The modules beside the model's body that have parameters: what makes answers of its features, pooler included.

    Only for models of tasks :func:`with a head <has_head>`; in others these are language heads, tied to embeddings.
    """
    body = getattr(model, "base_model_prefix", "")
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    return [name for name in children if (name != body if body in children else name in _KNOWN)]


def check_language_head(bare: nn.Module, names: Collection[str], *, key: str) -> None:
    """See that a model's files have the language head by which a prompt is answered.

    Args:
        bare: the model's modules; weights need not be there.
        names: of the tensors in its files; empty where they are not known.
        key: the value of ``model.name_or_path``.

    Raises:
        UserError: they have none of its parameters but what it shares with the embeddings.
    """
    tied = tuple(getattr(bare, "_tied_weights_keys", None) or ())
    heads = head_modules(bare)
    own = [name for name, _ in bare.named_parameters() if name.split(".")[0] in heads]
    if getattr(bare.config, "tie_word_embeddings", False):  # type: ignore[union-attr]
        own = [name for name in own if not any(name == pattern or re.search(pattern, name) for pattern in tied)]
    if names and own and not any(name in names for name in own):
        raise UserError(
            f"model.name_or_path={key!r}: its files have no {own[0]}, no language head to answer task.prompt by; give "
            f"the checkpoint of a {type(bare).__name__}, or leave out task.prompt"
        )


def output_layer(model: nn.Module, classes: int) -> tuple[str, nn.Linear] | None:
    """The last linear layer of the head with an output for each of ``classes``, and its name; None without one."""
    heads = head_modules(model)
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes and name.split(".")[0] in heads
    ]
    return layers[-1] if layers else None


def own_labels(name_or_path: str, **options: Any) -> dict[int, str]:
    """Names of the classes that a checkpoint's config declares, by number; made up by transformers if it has none.

    Args:
        options: ``revision`` and ``trust_remote_code``, as the model is loaded with.
    """
    from transformers import AutoConfig

    return dict(sorted((AutoConfig.from_pretrained(name_or_path, **options).id2label or {}).items()))


def with_labels_of(model_config: Any, labels: Mapping[int, str]) -> Any:
    """A copy of a model's config with other classes."""
    changed = copy.deepcopy(model_config)
    changed.id2label = dict(labels)
    changed.label2id = {name: number for number, name in labels.items()}
    return changed


def row_order(own: Mapping[int, str], wanted: Mapping[int, str]) -> list[int] | None:
    """For every class of ``wanted`` the row of a head for ``own``; None where the names do not match one to one.

    Case, blanks, hyphens and underscores do not count.
    """
    if sorted(own) != list(range(len(own))):
        return None
    rows = {_plain(name): number for number, name in own.items()}
    order = [rows.get(_plain(wanted[number])) for number in sorted(wanted)]
    if len(rows) != len(own) or len(set(order)) != len(own) or None in order:
        return None
    return [row for row in order if row is not None]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", str(name).casefold()) or str(name)


def adopt_head(
    model: Any, model_config: Any, own: Mapping[int, str], new: set[str], *, name: str, train_head: bool, says: bool
) -> set[str]:
    """Make the head that a checkpoint was loaded with, or that is new, the task's. With ZeRO-3 a collective.

    A head of as many outputs is taken over, its rows in the order of the task's labels where the names are the same;
    one of another number loses its output layer for a new one.

    Args:
        model: loaded, with a head for the classes ``own``; gets ``model_config``'s classes.
        own: the checkpoint's classes by number (:func:`own_labels`).
        new: parameters that the checkpoint lacks.
        name: of the model, as the config has it.
        train_head: ``adapter.train_head``.
        says: whether to report what is done.

    Returns:
        All parameters that are to be drawn: ``new``, and those of a new output layer.

    Raises:
        UserError: an output layer of another number that cannot be found; or ``adapter.train_head=false`` and a head
            that must be.
    """
    wanted = dict(model_config.id2label)
    key, names = f"model.name_or_path={name!r}", ", ".join(printable(str(label)) for label in own.values())
    layer = output_layer(model, len(own))
    if layer is None:
        if len(own) != len(wanted):
            raise UserError(
                f"{key}: its head has {len(own)} outputs, the task {len(wanted)}, and its output layer cannot be told "
                "from others; give a base without a head"
            )
        return new
    is_there = f"{layer[0]}.weight" not in new
    note = None
    if len(own) != len(wanted):
        new = new | _replace(model, *layer, outputs=len(wanted))
        model.config.id2label, model.config.label2id = wanted, dict(model_config.label2id)
        if hasattr(model, "num_labels"):
            model.num_labels = len(wanted)
        if is_there:
            note = f"its head has {len(own)} outputs ({names}), the task {len(wanted)}: {layer[0]} is drawn anew"
    elif is_there and model_config.problem_type != "regression":
        order = row_order(own, wanted)
        if order is None:
            ours = ", ".join(printable(str(wanted[number])) for number in sorted(wanted))
            note = f"its head names its classes {names}; they are taken by position, as {ours} of task.labels"
        elif order != sorted(order):
            if not train_head:
                right = list(own.values())
                raise UserError(
                    f"adapter.train_head=false keeps the head of {key} as it is, whose classes are {names} in this "
                    f"order; give task.labels in it: {right!r}"
                )
            _reorder(layer[1], order)
            note = (
                f"its head has the classes {names}; its rows are put in the order of task.labels. PEFT alone calls the "
                "adapter's classes by the base's order: give it id2label, as the adapter's README.md shows, or export "
                "a merged model"
            )
    drawn = sorted(name for name in new if name.split(".")[0] in head_modules(model))
    if drawn and not train_head:
        raise UserError(
            f"adapter.train_head=false, but {drawn[0]} of {key} is new and has to be trained; set it to true, or give "
            f"a checkpoint with a head of {len(wanted)} outputs"
        )
    if note and says and launched_rank() == 0:
        log.warning("%s: %s", key, note)
    return new


def centre_head(name: str, head: nn.Linear, targets: TargetScale, *, says: bool) -> None:
    """Let a new layer of one output start where its targets lie: their mean as its bias, its weights in their unit.

    From a bias of 0 the first steps go towards the mean alone, by every parameter that there is, and may leave
    features that tell no sample from another. With ZeRO-3 a collective.

    Args:
        name: of the layer, for reports.
        says: whether to report that it cannot, or that its numbers are too coarse.

    Raises:
        UserError: the layer's type holds no such numbers.
    """
    mean, deviation = targets.mean, targets.deviation
    scale = f"task.label={targets.column!r}: its mean is {mean:.3g}, its standard deviation {deviation:.3g}"
    parts = dict(head.named_parameters())
    weight = read_parameter(parts["weight"])
    kind = torch.finfo(weight.dtype)
    if max(abs(mean), deviation * float(weight.abs().max())) > kind.max:
        raise UserError(f"{scale}, and model.dtype=fp16 ends at {kind.max:.3g}; divide the column, or set fp32")
    write_parameter(parts["weight"], weight * deviation)
    if "bias" in parts:
        write_parameter(parts["bias"], torch.full_like(read_parameter(parts["bias"]), mean))
    if not says or launched_rank() != 0:
        return
    remedy = "subtract the mean from the column, and add it to what is predicted"
    if "bias" not in parts and abs(mean) > deviation:
        log.warning("%s, and the new head %s has no bias that could start there; %s", scale, name, remedy)
    elif abs(mean) * kind.eps > deviation / 8:
        log.warning("%s: too near to be told apart in %s; %s", scale, str(kind.dtype), remedy)


def _replace(model: nn.Module, name: str, layer: nn.Linear, *, outputs: int) -> set[str]:
    """Put a layer without values in the place of an output layer; the names of its parameters."""
    old = layer.weight
    fresh = nn.Linear(layer.in_features, outputs, layer.bias is not None, device=old.device, dtype=old.dtype)
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, fresh)
    return {f"{name}.{part}" for part, _ in fresh.named_parameters()}


def _reorder(layer: nn.Linear, order: list[int]) -> None:
    """Put the rows of a layer in another order."""
    for param in layer.parameters():
        write_parameter(param, read_parameter(param)[torch.tensor(order, device=param.device)])
