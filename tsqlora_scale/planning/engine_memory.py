"""Memory of a rank by part, under every engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tsqlora_scale.config.model_section import ADAPTER_TRAITS
from tsqlora_scale.config.rank_sections import COMPONENT_POLICIES
from tsqlora_scale.config.schema import Config
from tsqlora_scale.engine.fsdp import AT_ONCE
from tsqlora_scale.engine.zero_internals import bucket_size
from tsqlora_scale.planning.held_bytes import HeldWeights
from tsqlora_scale.planning.phantom_passes import Machine, PassNeeds
from tsqlora_scale.ranks.gradient_sketches import SKETCH_ROWS
from tsqlora_scale.ranks.policies.gain import most_ranks

GIB = 2**30
#: DeepSpeed's defaults under ZeRO-3: parameters that may stay whole between their uses, and that are fetched ahead.
ALIVE, AHEAD = 10**9, 5 * 10**7
#: Not counted but allowed for: CUDA's context and libraries, NCCL's buffers, and pieces that the allocator cannot use.
CONTEXT, COMMUNICATION, FRAGMENTS = int(0.6 * GIB), int(0.4 * GIB), 0.05


@dataclass(frozen=True)
class SharedState:
    """What an engine makes of parameters, in bytes on one rank.

    Attributes:
        base: the frozen base between uses.
        factors: what trains, with copies that the engine keeps of it.
        gradients: of what trains.
        moments: of Adam.
        buckets: what gradients are exchanged through.
        gathered: weights of others that are there while they are used.
        gathered_first: those that are there before anything else of a pass is.
        ahead: of what is gathered ahead, the pieces in which it comes, in steps and scoring.
        ahead_forward: the same of a forward pass alone, whose last weights come when the first pieces are gone.
    """

    base: int
    factors: int
    gradients: int
    moments: int
    buckets: int = 0
    gathered: int = 0
    gathered_first: int = 0
    ahead: int = 0
    ahead_forward: int = 0


@dataclass(frozen=True)
class EngineMemory:
    """The plan of one engine.

    Attributes:
        engine: its name, as a run records it.
        devices: ranks, one on each.
        micro_batch_size: samples of a rank and pass.
        checkpointing: of activations.
        parts: bytes by part; each is what it takes at the moment that it takes most.
        phases: bytes of a whole step, scoring batch and evaluation batch.
        allowance: bytes that are not counted but allowed for.
    """

    engine: str
    devices: int
    micro_batch_size: int
    checkpointing: bool
    parts: dict[str, int]
    phases: dict[str, int]
    allowance: int

    @property
    def total(self) -> int:
        """Bytes of the worst phase, with the allowance."""
        return max(self.phases.values()) + self.allowance


def _plain(weights: HeldWeights, _: int) -> SharedState:
    trained = 4 * weights.trained_elements
    return SharedState(weights.base, trained, trained, 2 * trained)


def _ddp(weights: HeldWeights, _: int) -> SharedState:
    trained = 4 * weights.trained_elements
    return SharedState(weights.base, trained, trained, 2 * trained, buckets=trained)


def _zero2(weights: HeldWeights, ranks: int) -> SharedState:
    trained, part = 4 * weights.trained_elements, 4 * -(-weights.trained_elements // ranks)
    # the partition that is stepped is a copy; gradients are whole until they are reduced, and their own part stays
    return SharedState(weights.base, trained + part, trained + part, 2 * part, buckets=_bucket(weights))


def _zero3(weights: HeldWeights, ranks: int) -> SharedState:
    part = 4 * weights.trained_on(ranks)
    shared = [weight for weight in weights.frozen if weight.held(ranks) < weight.whole]
    elements = sum(weight.elements for weight in shared)
    each = sum(weight.whole for weight in shared) / max(elements, 1)
    # what comes lies in one piece before every parameter gets its own: a layer's, and what was asked for ahead
    coming = max((weight.elements for weight in shared), default=0)
    ahead = min(elements - coming, AHEAD)
    return SharedState(
        base=sum(weight.held(ranks) for weight in weights.frozen),
        factors=2 * part,
        gradients=4 * max(weights.trained, default=0) + part,
        moments=2 * part,
        buckets=_bucket(weights),
        gathered=int((min(elements, ALIVE + AHEAD) + coming) * each) + 4 * weights.trained_elements * (ranks > 1),
        ahead=int(ahead * each),
        ahead_forward=int(max(min(elements, coming + AHEAD) + ahead - elements - coming, 0) * each),
    )


def _fsdp2(weights: HeldWeights, ranks: int) -> SharedState:
    trained = 4 * weights.trained_elements
    shared = [weight for weight in weights.frozen if weight.held_rows(ranks) < weight.whole]
    return SharedState(
        base=sum(weight.held_rows(ranks) for weight in weights.frozen),
        factors=trained,
        gradients=trained,
        moments=2 * trained,
        buckets=2 * 4 * min(weights.trained_elements, AT_ONCE),
        gathered=_side_by_side([weight.whole for weight in shared if not weight.looked_up]),
        # no backward pass asks for an embedding that is frozen
        gathered_first=_side_by_side([weight.whole for weight in shared if weight.looked_up]),
    )


def _side_by_side(sizes: list[int]) -> int:
    """The most of a layer's weight as it came and as it was put in place, and that of the next layer as it comes, or,
    in a backward pass, of the one before."""
    padded = [0, *sizes, 0]
    return max((2 * padded[at] + max(padded[at - 1], padded[at + 1]) for at in range(1, len(sizes) + 1)), default=0)


def _bucket(weights: HeldWeights) -> int:
    return 4 * bucket_size(weights.trained_elements)


#: By name, those that need the least exchange first. An engine more is a function more.
ENGINES: dict[str, Callable[[HeldWeights, int], SharedState]] = {
    "plain": _plain,
    "ddp": _ddp,
    "zero2": _zero2,
    "fsdp2": _fsdp2,
    "zero3": _zero3,
}


def engines_for(config: Config, devices: int) -> list[str]:
    """The engines that run a config on so many devices."""
    refused = set()
    if config.model.dtype == "fp16":
        refused |= {"zero2", "zero3", "fsdp2"}
    if config.adapter.init == "eva":  # looks at samples with the base whole
        refused |= {"zero3", "fsdp2"}
    integers = config.model.quantization == "nf4" and config.model.quant_storage == "uint8"
    if integers or not ADAPTER_TRAITS[config.adapter.type].fsdp:
        refused.add("fsdp2")
    return [name for name in ENGINES if (name == "plain") == (devices == 1) and name not in refused]


def engine_memory(
    engine: str,
    config: Config,
    weights: HeldWeights,
    *,
    devices: int,
    micro_batch_size: int,
    checkpointing: bool,
    passes: dict[str, PassNeeds],
    machine: Machine,
) -> EngineMemory:
    """Parts and phases of one engine.

    Args:
        passes: what ``step``, ``scoring`` and ``evaluation`` need.
    """
    state = ENGINES[engine](weights, devices)
    step, scored, judged = passes["step"], passes["scoring"], passes["evaluation"]
    unpacked = max((weight.unpacked for weight in weights.frozen), default=0)
    listened, sketches = _listening(config, weights), _sketches(config, weights)
    importances = _importances(config, weights)
    parts = {
        "base": state.base,
        "scales of 4-bit blocks": weights.scales,
        "factors and head": state.factors,
        "gradients": state.gradients,
        "moments of Adam": state.moments,
        "buckets of the engine": state.buckets,
        "gathered weights": max(state.gathered + state.ahead, state.gathered_first),
        "one 4-bit layer unpacked": unpacked,
        "activations": step.kept,
        "logits and cross-entropy": step.logits,
        "passing in a step": step.passing,
        "sensitivity of one layer": listened,
        "importances of components": importances,
        "sketches of gradients": sketches,
        "scoring batch": scored.peak,
        "evaluation batch": judged.peak,
    }
    between = state.base + weights.scales + state.factors + state.moments + state.buckets + importances + sketches
    used = between + state.gathered + unpacked
    first = between + state.gathered_first
    phases = {
        "step": state.gradients
        + max(used + state.ahead + step.kept + step.logits + max(step.passing, listened), first),
        "scoring": max(used + state.ahead + scored.peak, first + scored.kept) if scored.peak else between,
        "evaluation": max(used + state.ahead_forward + judged.peak, first) if judged.peak else between,
    }
    moving = max(phases.values()) - between
    allowance = int(FRAGMENTS * moving) + CONTEXT + (COMMUNICATION if devices > 1 else 0) if machine == "gpu" else 0
    return EngineMemory(engine, devices, micro_batch_size, checkpointing, parts, phases, allowance)


def _listening(config: Config, weights: HeldWeights) -> int:
    """The gradient of one weight in float32, and its product with the weight, while sensitivities are heard."""
    chosen = config.allocation.policy in COMPONENT_POLICIES and config.resize.grow_init != "gradient"
    if not config.adapts_ranks or config.sensitivity.estimator == "adapter" or chosen:
        return 0
    return 2 * 4 * weights.largest_layer


def _sketches(config: Config, weights: HeldWeights) -> int:
    """Small sketches of every layer's gradient, float32, on every rank: of ``gain`` three, of as many rows as a layer
    may have ranks; of ``resize.grow_init: gradient`` one."""
    worths = config.allocation.policy == "gain"
    if not config.adapts_ranks or not (worths or config.resize.grow_init == "gradient"):
        return 0
    rows = max(SKETCH_ROWS, most_ranks(config.allocation, config.adapter.r) if worths else 0)
    return 4 * rows * weights.inputs * (3 if worths else 1)


def _importances(config: Config, weights: HeldWeights) -> int:
    """Two averages of every element that is trained, a head's as an allowance, and a step's products, on every rank."""
    return 3 * 4 * weights.trained_elements if config.allocation.policy in COMPONENT_POLICIES else 0
