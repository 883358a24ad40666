"""What sections of a config ask of one another: rules that no section can check by itself.

Each rule raises :class:`ValueError` with a message that names the keys, their values and the remedy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsqlora_scale.config.model_section import ADAPTER_TRAITS
from tsqlora_scale.config.quality_sections import EVEN_SELECTORS, GRADIENT_SELECTORS, QUERY_SELECTORS
from tsqlora_scale.config.rank_sections import COMPONENT_POLICIES

if TYPE_CHECKING:
    from tsqlora_scale.config.schema import Config

#: What a task's answers are, for messages.
ANSWERS = {"classification": "classes", "regression": "numbers"}


def check_agreements(config: Config) -> None:
    """Ask all rules, in order.

    Raises:
        ValueError: of the first that is broken.
    """
    for rule in RULES:
        rule(config)


def base_agrees(config: Config) -> None:
    """What is trained against how the base is stored."""
    kind = config.adapter.type
    if config.model.quantization != "none" and not ADAPTER_TRAITS[kind].packed:
        raise ValueError(
            f"'adapter.type: {kind}' trains parameters of the base itself, which 'model.quantization: "
            f"{config.model.quantization}' packs; set 'model.quantization: none' or 'adapter.type: lora'"
        )
    if config.model.quantization != "none" and config.adapter.starts_in_base:
        raise ValueError(
            f"'adapter.init: {config.adapter.init}' takes factors out of weights, which 'model.quantization: "
            f"{config.model.quantization}' packs; remove it"
        )
    if kind == "prefix" and config.model.attention not in ("auto", "eager", "sdpa"):
        raise ValueError(
            f"'adapter.type: prefix' puts keys before those of a text, for which 'model.attention: "
            f"{config.model.attention}' has no mask; set 'model.attention: sdpa' or 'auto'"
        )
    if config.allocation.policy == "file" and not ADAPTER_TRAITS[kind].layers:
        raise ValueError(
            f"'allocation.policy: file' gives ranks to layers, and 'adapter.type: {kind}' has none; set "
            "'allocation.policy: fixed'"
        )
    if config.allocation.policy == "file" and config.adapter.init != "default":
        raise ValueError(
            f"'allocation.policy: file' draws factors of its ranks, and 'adapter.init: {config.adapter.init}' starts "
            "them otherwise; remove one of them"
        )
    changes = _changes_base(config)
    if config.task.label_words == "auto" and changes is not None:
        raise ValueError(f"'task.label_words: auto' asks the base alone, which '{changes}' changes; give the words")
    if config.looks_before_training and config.sampling.selector != "file" and changes is not None:
        raise ValueError(
            f"'sampling.selector: {config.sampling.selector}' looks at the base alone, which '{changes}' "
            "changes; choose another of either"
        )


def _changes_base(config: Config) -> str | None:
    """What gives the base other values than its own before the run, and cannot be switched off; None: nothing does."""
    if config.adapter.type in ("bitfit", "full"):
        if config.adapter.init_from is not None:
            return "adapter.init_from"
        if config.pretrains:
            return "pretrain"
    return f"adapter.init: {config.adapter.init}" if config.adapter.starts_in_base else None


def ranks_agree(config: Config) -> None:
    """What gives layers their ranks against what is trained, and against what is listened to."""
    r_max = config.allocation.r_max
    if config.allocation.policy == "file" and config.adapter.init_from is not None:
        raise ValueError(
            "'allocation.policy: file' and 'adapter.init_from' both give the layers their ranks; remove one of them"
        )
    if config.adapter.orthogonality and not ADAPTER_TRAITS[config.adapter.type].triplets:
        raise ValueError(
            f"'adapter.orthogonality' ({config.adapter.orthogonality:g}) is for factors with a diagonal between, "
            f"and 'adapter.type: {config.adapter.type}' has none; set 'adapter.type: svd' or remove it"
        )
    if not config.adapts_ranks:
        return
    if config.adapter.starts_in_base:
        raise ValueError(
            f"'adapter.init: {config.adapter.init}' makes factors of the weights' own leading part, which "
            f"'allocation.policy: {config.allocation.policy}' would cut away; set 'allocation.policy: fixed' or remove "
            "it"
        )
    if not ADAPTER_TRAITS[config.adapter.type].resized:
        raise ValueError(
            f"'allocation.policy: {config.allocation.policy}' changes ranks, and those of 'adapter.type: "
            f"{config.adapter.type}' cannot change; set 'allocation.policy: fixed' or 'adapter.type: lora'"
        )
    if not (config.allocation.r_min <= config.adapter.r <= (r_max or config.adapter.r)):
        raise ValueError(
            f"'adapter.r' ({config.adapter.r}) must lie between 'allocation.r_min' ({config.allocation.r_min}) "
            f"and 'allocation.r_max' ({r_max})"
        )
    triplets_fit(config)
    if config.resize.grow_init == "gradient" and config.sensitivity.estimator == "adapter":
        raise ValueError(
            "'resize.grow_init: gradient' needs the gradients of the base's weights, which "
            "'sensitivity.estimator: adapter' does not see; choose another of either"
        )
    if config.allocation.policy == "gain" and config.sensitivity.estimator == "adapter":
        raise ValueError(
            "'allocation.policy: gain' needs the gradients of the base's weights, which 'sensitivity.estimator: "
            "adapter' does not see; choose another of either"
        )
    if config.allocation.policy == "gain" and config.sensitivity.window == 1:
        raise ValueError(
            "'allocation.policy: gain' tells signal from noise by alternate steps, and 'sensitivity.window' is 1; "
            "set it to 2 or more"
        )


def triplets_fit(config: Config) -> None:
    """What policies that choose components ask for, and adapters whose components are triplets."""
    target, start = config.allocation.target_r, config.adapter.r
    if config.allocation.policy == "adalora" and target is not None and target > start:
        raise ValueError(
            f"'allocation.target_r' ({target}) is what 'allocation.policy: adalora' ends with, and must not be "
            f"above 'adapter.r' ({start}), what it starts with"
        )
    chooses = config.allocation.policy in COMPONENT_POLICIES
    for key, usual in (("max_change", None), ("budget_unit", "rank")):
        if chooses and getattr(config.allocation, key) != usual:
            raise ValueError(
                f"'allocation.{key}' is for policies that divide a budget among layers, and 'allocation.policy: "
                f"{config.allocation.policy}' chooses components; remove it"
            )
    if ADAPTER_TRAITS[config.adapter.type].triplets and not chooses and config.resize.shrink != "importance":
        raise ValueError(
            f"'resize.shrink: {config.resize.shrink}' mixes components, and those of 'adapter.type: "
            f"{config.adapter.type}' stay whole or go; set 'resize.shrink: importance'"
        )


def draws_agree(config: Config) -> None:
    """How samples are drawn against the task, and against what can be scored."""
    if config.sampling.stratify is True and config.task.type != "classification" and not config.task.asks_for_shares:
        raise ValueError(f"'sampling.stratify: true' needs labels, but 'task.type' is {config.task.type!r}; remove it")
    if config.task.asks_for_shares and not config.sampling.replacement:
        raise ValueError(
            "'sampling.replacement: false' takes every sample once an epoch, and 'task.mixture' asks for other "
            "shares of the draws; remove one of them"
        )
    selector = config.sampling.selector
    is_even = selector in EVEN_SELECTORS or (selector == "query" and not config.sampling.soft)
    if config.sampling.use == "weight" and is_even:
        what = f"'sampling.selector: {selector}'" + (" with 'soft: false'" if selector == "query" else "")
        raise ValueError(
            f"'sampling.use: weight' weighs losses by probabilities, and {what} has none: all that it keeps count "
            "alike; remove one of them"
        )
    if selector in QUERY_SELECTORS and config.task.query is None:
        raise ValueError(
            f"'sampling.selector: {selector}' chooses by the rows of 'task.query', which is not set; name a file"
        )
    if selector in ("query", "file") and config.sampling.keep_fraction == "auto" and config.train.epochs is not None:
        remedy = ", or 'keep_fraction' to a number" + (" where the file has scores" if selector == "file" else "")
        raise ValueError(
            "'train.epochs' counts passes over S, whose size 'sampling.keep_fraction: auto' finds in the run; set "
            f"'train.max_steps'{remedy}"
        )
    if selector not in GRADIENT_SELECTORS:
        return
    if not ADAPTER_TRAITS[config.adapter.type].scored:
        raise ValueError(
            f"'sampling.selector: {selector}' needs gradients by sample, and 'adapter.type: {config.adapter.type}' "
            "has none that are exact; set 'sampling.selector: full' or 'adapter.type: lora'"
        )
    if ADAPTER_TRAITS[config.adapter.type].triplets and config.scoring.warmup_steps == 0:
        raise ValueError(
            f"'scoring.warmup_steps' is 0, and the diagonal of 'adapter.type: {config.adapter.type}' starts at zero: "
            "no sample has a gradient then; give some steps"
        )
    if config.scoring.include_head and not config.adapter.train_head:
        raise ValueError(
            "'scoring.include_head' scores by the head's gradients, and 'adapter.train_head: false' does not train "
            "it; turn one of them off"
        )
    if config.sampling.redundancy and config.scores_online:
        raise ValueError(
            "'sampling.redundancy' compares gradients, and 'scoring.source: online' keeps none; "
            "set 'scoring.source: pass' or 'sampling.redundancy: 0'"
        )
    if selector == "quality" and config.sampling.redundancy and config.scoring.convergence == "loss_trend":
        raise ValueError(
            "'sampling.redundancy' compares gradients, and 'scoring.convergence: loss_trend' keeps none; "
            "set 'scoring.convergence: alignment' or 'sampling.redundancy: 0'"
        )


def selector_fits(config: Config) -> None:
    """What the papers' selectors need of task and model."""
    selector, kind = config.sampling.selector, config.task.type
    fits = {"el2n": ("classification",), "rho": ("classification", "regression")}.get(selector)
    if fits is not None and kind not in fits:
        raise ValueError(
            f"'sampling.selector: {selector}' is for answers that are "
            f"{' or '.join(ANSWERS[each] for each in fits)}, and 'task.type' is {kind!r}; choose another selector"
        )
    if selector == "less" and config.sampling.less_gradients == "adam" and config.scoring.warmup_steps == 0:
        raise ValueError(
            "'sampling.less_gradients: adam' takes the optimizer's moments, and 'scoring.warmup_steps: 0' leaves it "
            "none; give some steps, or set 'less_gradients: plain'"
        )
    warmed_up = config.looks_at_pool and not config.looks_before_training and not config.scores_data
    if warmed_up and config.scoring.proxy_model is not None:
        raise ValueError(
            f"'scoring.proxy_model' scores for 'sampling.selector: quality' alone, and it is {selector!r}; set it "
            "to null"
        )


def packs_texts(config: Config) -> None:
    """Packing is for causal models."""
    if config.train.packing and config.task.type != "causal":
        raise ValueError(
            f"'train.packing: true' lays texts of causal models end to end, and 'task.type' is {config.task.type!r}; "
            "set it to false (train.group_by_length saves padding, too)"
        )
    if config.train.packing and ADAPTER_TRAITS[config.adapter.type].prompts:
        raise ValueError(
            f"'train.packing: true' lays texts end to end, and what 'adapter.type: {config.adapter.type}' trains "
            "stands before every one; set it to false (train.group_by_length saves padding, too)"
        )


def evaluation_has_data(config: Config) -> None:
    """What needs evaluations."""
    if config.train.eval_every and not config.task.has_dev:
        raise ValueError(
            f"'train.eval_every' is {config.train.eval_every}, but there is nothing to evaluate on; "
            "set 'task.dataset.dev_file', or 'dev_split' of a hub dataset"
        )
    for key in ("keep", "patience"):
        if getattr(config.train, key) not in ("last", "average", None) and not config.train.eval_every:
            raise ValueError(
                f"'train.{key}' is {getattr(config.train, key)!r}, but there are no evaluations while it trains; "
                f"set 'train.eval_every', or remove it"
            )


RULES = (base_agrees, ranks_agree, draws_agree, selector_fits, packs_texts, evaluation_has_data)
