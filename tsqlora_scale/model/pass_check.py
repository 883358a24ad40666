"""Models that cannot learn a task, and layers that cannot learn from it, found before the weights are loaded."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.launcher import launched_rank
from tsqlora_scale.config.model_section import ADAPTER_TRAITS
from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.arithmetic import unit_roundoff
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.model.base_model import DTYPES, skeleton
from tsqlora_scale.model.linear_layers import (
    expert_kind,
    kinds_of,
    linear_layers,
    note_on_weights,
    read_past,
    resolve_targets,
)
from tsqlora_scale.model.placed_trial import fault_of
from tsqlora_scale.model.probe import (
    Probe,
    keeps_apart,
    packed_texts,
    padded_rows,
    probe_inputs,
    run_probe,
)
from tsqlora_scale.tasks.evaluation import evaluating
from tsqlora_scale.tasks.objectives.model_inputs import model_class
from tsqlora_scale.tasks.packing import Packer

if TYPE_CHECKING:
    from tsqlora_scale.tasks import Task

log = logging.getLogger(__name__)

#: Ways of attention that a copy of the model is tried with on a CPU, and whose masks are all made in one way.
TRIED = ("auto", "eager", "sdpa")
#: By how many roundings of the largest logit a text's logits may differ in company.
ROUNDINGS = 12


@dataclass(frozen=True)
class PassFindings:
    """What was found out about a model that can learn the task.

    Attributes:
        unreached: linear layers that nothing trained may sit in: text gives them no gradient.
        without_batch: linear layers that never get the batch as their first dimension.
        idle: parameters that no logit depends on, where ``adapter.type`` asks for them.
        reads_past: whether modules read the weights of others without calling them, as Mamba's mixers do.
        experts: linear layers of single experts: which of them are called, a rank's own texts decide.
        trains_experts: whether anything in them is trained.
    """

    unreached: frozenset[str] = frozenset()
    without_batch: frozenset[str] = frozenset()
    reads_past: bool = False
    idle: frozenset[str] = frozenset()
    experts: frozenset[str] = frozenset()
    trains_experts: bool = False


def check_pass(config: Config, model_config: Any, task: Task) -> PassFindings:
    """What a pass of a few tokens through a copy of the model shows; see :mod:`tsqlora_scale.model.probe`.

    Raises:
        UserError: a forward fails in the model's own code, a model that is to write text sees ahead in it, or no layer
            of ``adapter.target_modules`` trains.
    """
    trust, key = config.model.trust_remote_code, f"model.name_or_path={config.model.name_or_path!r}"
    packs = config.train.packing
    options = {"attn_implementation": "eager"} if packs and config.model.attention == "eager" else {}
    probe = run_probe(
        task.auto_class, model_config, probe_inputs(task), padded=padded_rows(task),
        packed=packed_texts(task) if packs else None, trust_remote_code=trust,
        finds_idle=config.adapter.type in ("bitfit", "full"), **options,
    )  # fmt: skip
    if probe.failure is not None:
        _tell_of_failure(key, task.auto_class, model_config, probe)
    if packs and not probe.packs:
        raise UserError(
            f"train.packing: {key} is a {model_config.model_type} model, which was not seen to keep texts apart that "
            "stand end to end in a row: it takes no positions, or has a state that goes on from text to text; set it "
            "to false (train.group_by_length saves padding, too)"
        )
    sees_ahead = probe.sees_ahead
    if sees_ahead is None and task.auto_class is AutoModelForCausalLM:  # then by rule: no decoder fills in masks
        is_decoder = getattr(model_config, "is_decoder", False)
        sees_ahead = type(model_config) in MODEL_FOR_MASKED_LM_MAPPING and not is_decoder
    writes = task.auto_class in (AutoModelForCausalLM, AutoModelForSeq2SeqLM) and config.task.type != "classification"
    writes = writes and config.task.objective is None
    if writes and sees_ahead:
        raise UserError(
            f"{key} is a {model_config.model_type} model whose tokens see those after them, so that in "
            f"task.type={config.task.type!r} every label would be there to copy; choose a decoder (GPT-2, Llama), "
            "or another task.type"
        )
    bare = skeleton(task.auto_class, model_config, trust_remote_code=trust)
    _check_placed(config, model_config, task, probe)
    _check_beams(config, bare)
    experts = frozenset(name for name in linear_layers(bare) if expert_kind(name) != name)
    targets, layers, idle = config.adapter.target_modules, config.adapter.layers, set[str]()
    trains_experts = bool(experts) and config.adapter.type in ("bitfit", "full")
    if ADAPTER_TRAITS[config.adapter.type].layers:
        chosen, all_of_them = (
            set(resolve_targets(bare, targets, unreached=u, layers=layers)) for u in (probe.unreached, ())
        )
        idle, trains_experts = all_of_them - chosen, bool(experts & chosen)
    if launched_rank() == 0:
        if idle:
            log.warning("%d linear layers get no gradient from text and no adapter: %s", len(idle), kinds_of(idle))
        if probe.reads_pads:
            log.warning(
                "%s: what this %s model makes of a row depends on the padding beside it: losses and answers change "
                "with train.micro_batch_size, train.eval_batch_size and the number of processes",
                key,
                model_config.model_type,
            )
        if config.model.quantization == "nf4" and (read := read_past(bare)):
            log.warning(
                "%d linear layers, whose weights are read past them, stay unquantised: %s", len(read), kinds_of(read)
            )
        bytes_each = 4 if config.model.dtype == "fp32" else 2
        if note := note_on_weights(bare, is_4_bit=config.model.quantization == "nf4", bytes_each=bytes_each):
            log.warning("%s", note)
    return PassFindings(
        probe.unreached, probe.without_batch, bool(read_past(bare)), probe.idle, experts, trains_experts
    )


def _check_placed(config: Config, model_config: Any, task: Task, probe: Probe) -> None:
    """Types that make texts longer, tried out.

    Raises:
        UserError: the model cannot be trained so.
    """
    from tsqlora_scale.model.adapters.adapter_type import own_type

    own = own_type(config.adapter.type)
    if own is None or not ADAPTER_TRAITS[config.adapter.type].prompts or probe.failure is not None:
        return
    attention = config.model.attention
    options = {"attn_implementation": attention} if attention in ("eager", "sdpa") else {}
    fault = fault_of(
        own, config.adapter, task.auto_class, model_config, probe_inputs(task), unreached=probe.unreached,
        padded=None if probe.reads_pads is not False else padded_rows(task),
        trust_remote_code=config.model.trust_remote_code, **options,
    )  # fmt: skip
    if fault is not None:
        raise UserError(
            f"adapter.type={config.adapter.type!r} does not go with a {model_config.model_type} model ({fault}); "
            "choose adapter.type=lora"
        )


def packer_of(config: Config, model_config: Any) -> Packer:
    """Lays texts end to end as the config's attention is best at."""
    width = getattr(model_config.get_text_config(), "hidden_size", None)
    built = model_class(AutoModelForCausalLM, model_config)
    known = {} if built is None else inspect.signature(built.forward).parameters
    return Packer(
        width=width or 768,
        longest_row=config.task.max_length,
        flash=config.model.attention.startswith("flash_attention"),
        takes_starts=any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()),
    )


def check_loaded(config: Config, module: Any, task: Task, world: World) -> None:
    """Whether the loaded model keeps texts apart, by kernels that its copy was not tried with. A collective.

    Args:
        module: the model itself, not an engine around it; its modes stay as they are.

    Raises:
        UserError: it does not, on any rank.
    """
    attention = config.model.attention
    if task.packer is None or attention in TRIED:
        return
    most = ROUNDINGS * unit_roundoff(DTYPES[config.model.dtype])
    with world.together(), evaluating(module):
        if not keeps_apart(module, packed_texts(task).to(world.device), most=most):
            raise UserError(
                f"train.packing: with model.attention={attention!r} this {module.config.model_type} model does not "
                "keep texts apart that stand end to end in a row; choose model.attention: sdpa, or set it to false"
            )


def _tell_of_failure(key: str, auto_class: Any, model_config: Any, probe: Probe) -> None:
    """A model whose own code fails: certain where the run computes on a CPU, too, with weights of its own.

    Raises:
        UserError: then.
    """
    names = getattr(model_config, "architectures", None) or [f"{auto_class.__name__} of {model_config.model_type}"]
    told = f"{key}: a forward pass of {names[0]} fails in the model's own code ({probe.failure})"
    if probe.is_sure and not torch.cuda.is_available():
        raise UserError(f"{told}; take another release of transformers, or another model")
    if launched_rank() == 0:
        log.warning("%s on a CPU: which layers can train is not looked for, and a run may fail in the same way", told)


def _check_beams(config: Config, bare: Any) -> None:
    """Beam search reorders the cache, and recurrent states of some models (RWKV) cannot be.

    Raises:
        UserError: naming the key; it would end the run at its first evaluation.
    """
    if not config.task.has_dev or config.task.num_beams == 1 or not getattr(bare, "_is_stateful", False):
        return
    keeps_cache = getattr(bare, "_supports_default_dynamic_cache", lambda: True)()
    if not keeps_cache and not hasattr(bare, "_reorder_cache"):
        raise UserError(
            f"task.num_beams={config.task.num_beams}: a {bare.config.model_type} model has a recurrent state, which "
            "beam search cannot reorder; set it to 1"
        )
