"""The run, as typed data: YAML, then ``section.key=value``, checked before torch is imported.

Every key that a config file may hold is a field of a section below. Unknown keys are errors that name the nearest
known one. Checks that need the data, the model's config or the machine live in :mod:`tsqlora_scale.run.preflight`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import model_validator

from tsqlora_scale.config.fields import Section
from tsqlora_scale.config.model_section import ADAPTER_TRAITS, AdapterConfig, ModelConfig
from tsqlora_scale.config.presets import from_0_1, with_preset
from tsqlora_scale.config.pretrain_section import PretrainConfig, pretraining_sections
from tsqlora_scale.config.quality_sections import (
    BLIND_SELECTORS,
    FORWARD_SELECTORS,
    GRADIENT_SELECTORS,
    QUERY_SELECTORS,
    SELECTORS,
    SIZING_SELECTORS,
    SamplingConfig,
    ScoringConfig,
)
from tsqlora_scale.config.rank_sections import (
    COMPONENT_POLICIES,
    AllocationConfig,
    ResizeConfig,
    ScheduleConfig,
    SensitivityConfig,
)
from tsqlora_scale.config.task_section import DatasetConfig, TaskConfig
from tsqlora_scale.config.train_section import RunConfig, TrainConfig

__all__ = [
    "AdapterConfig",
    "AllocationConfig",
    "Config",
    "DatasetConfig",
    "ModelConfig",
    "PretrainConfig",
    "ResizeConfig",
    "RunConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "ScoringConfig",
    "SensitivityConfig",
    "TaskConfig",
    "TrainConfig",
]


#: What a task's answers are, for messages.
ANSWERS = {"classification": "classes", "regression": "numbers"}


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    task: TaskConfig
    adapter: AdapterConfig = AdapterConfig()
    scoring: ScoringConfig = ScoringConfig()
    sampling: SamplingConfig = SamplingConfig()
    sensitivity: SensitivityConfig = SensitivityConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    allocation: AllocationConfig = AllocationConfig()
    resize: ResizeConfig = ResizeConfig()
    pretrain: PretrainConfig = PretrainConfig()
    train: TrainConfig

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, tree: Any) -> Any:
        """The keys of the method, and those of release 0.1, as the keys of today."""
        return with_preset(from_0_1(tree)) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _base_agrees(self) -> Config:
        kind = self.adapter.type
        if self.model.quantization != "none" and not ADAPTER_TRAITS[kind].packed:
            raise ValueError(
                f"'adapter.type: {kind}' trains parameters of the base itself, which 'model.quantization: "
                f"{self.model.quantization}' packs; set 'model.quantization: none' or 'adapter.type: lora'"
            )
        if self.model.quantization != "none" and self.adapter.starts_in_base:
            raise ValueError(
                f"'adapter.init: {self.adapter.init}' takes factors out of weights, which 'model.quantization: "
                f"{self.model.quantization}' packs; remove it"
            )
        if self.allocation.policy == "file" and not ADAPTER_TRAITS[kind].layers:
            raise ValueError(
                f"'allocation.policy: file' gives ranks to layers, and 'adapter.type: {kind}' has none; set "
                "'allocation.policy: fixed'"
            )
        if self.allocation.policy == "file" and self.adapter.init != "default":
            raise ValueError(
                f"'allocation.policy: file' draws factors of its ranks, and 'adapter.init: {self.adapter.init}' starts "
                "them otherwise; remove one of them"
            )
        learned = kind in ("bitfit", "full") and self.adapter.init_from is not None
        if self.looks_before_training and self.sampling.selector != "file" and (learned or self.adapter.starts_in_base):
            key = "init_from" if learned else f"init: {self.adapter.init}"
            raise ValueError(
                f"'sampling.selector: {self.sampling.selector}' looks at the base alone, which 'adapter.{key}' "
                "changes; choose another of either"
            )
        return self

    @model_validator(mode="after")
    def _ranks_agree(self) -> Config:
        r_max = self.allocation.r_max
        if self.allocation.policy == "file" and self.adapter.init_from is not None:
            raise ValueError(
                "'allocation.policy: file' and 'adapter.init_from' both give the layers their ranks; remove one of them"
            )
        if self.adapter.orthogonality and not ADAPTER_TRAITS[self.adapter.type].triplets:
            raise ValueError(
                f"'adapter.orthogonality' ({self.adapter.orthogonality:g}) is for factors with a diagonal between, "
                f"and 'adapter.type: {self.adapter.type}' has none; set 'adapter.type: svd' or remove it"
            )
        if not self.adapts_ranks:
            return self
        if not ADAPTER_TRAITS[self.adapter.type].resized:
            raise ValueError(
                f"'allocation.policy: {self.allocation.policy}' changes ranks, and those of 'adapter.type: "
                f"{self.adapter.type}' cannot change; set 'allocation.policy: fixed' or 'adapter.type: lora'"
            )
        if not (self.allocation.r_min <= self.adapter.r <= (r_max or self.adapter.r)):
            raise ValueError(
                f"'adapter.r' ({self.adapter.r}) must lie between 'allocation.r_min' ({self.allocation.r_min}) "
                f"and 'allocation.r_max' ({r_max})"
            )
        self._triplets_fit()
        if self.resize.grow_init == "gradient" and self.sensitivity.estimator == "adapter":
            raise ValueError(
                "'resize.grow_init: gradient' needs the gradients of the base's weights, which "
                "'sensitivity.estimator: adapter' does not see; choose another of either"
            )
        if self.allocation.policy == "gain" and self.sensitivity.estimator == "adapter":
            raise ValueError(
                "'allocation.policy: gain' needs the gradients of the base's weights, which 'sensitivity.estimator: "
                "adapter' does not see; choose another of either"
            )
        if self.allocation.policy == "gain" and self.sensitivity.window == 1:
            raise ValueError(
                "'allocation.policy: gain' tells signal from noise by alternate steps, and 'sensitivity.window' is 1; "
                "set it to 2 or more"
            )
        return self

    def _triplets_fit(self) -> None:
        """What policies that choose components ask for, and adapters whose components are triplets."""
        target, start = self.allocation.target_r, self.adapter.r
        if self.allocation.policy == "adalora" and target is not None and target > start:
            raise ValueError(
                f"'allocation.target_r' ({target}) is what 'allocation.policy: adalora' ends with, and must not be "
                f"above 'adapter.r' ({start}), what it starts with"
            )
        chooses = self.allocation.policy in COMPONENT_POLICIES
        for key, usual in (("max_change", None), ("budget_unit", "rank")):
            if chooses and getattr(self.allocation, key) != usual:
                raise ValueError(
                    f"'allocation.{key}' is for policies that divide a budget among layers, and 'allocation.policy: "
                    f"{self.allocation.policy}' chooses components; remove it"
                )
        if ADAPTER_TRAITS[self.adapter.type].triplets and not chooses and self.resize.shrink != "importance":
            raise ValueError(
                f"'resize.shrink: {self.resize.shrink}' mixes components, and those of 'adapter.type: "
                f"{self.adapter.type}' stay whole or go; set 'resize.shrink: importance'"
            )

    @model_validator(mode="after")
    def _draws_agree(self) -> Config:
        if self.sampling.stratify is True and self.task.type != "classification" and not self.task.asks_for_shares:
            raise ValueError(
                f"'sampling.stratify: true' needs labels, but 'task.type' is {self.task.type!r}; remove it"
            )
        if self.task.asks_for_shares and not self.sampling.replacement:
            raise ValueError(
                "'sampling.replacement: false' takes every sample once an epoch, and 'task.mixture' asks for other "
                "shares of the draws; remove one of them"
            )
        selector = self.sampling.selector
        if selector in QUERY_SELECTORS and self.task.query is None:
            raise ValueError(
                f"'sampling.selector: {selector}' chooses by the rows of 'task.query', which is not set; name a file"
            )
        if selector in ("query", "file") and self.sampling.keep_fraction == "auto" and self.train.epochs is not None:
            raise ValueError(
                "'train.epochs' counts passes over S, whose size 'sampling.keep_fraction: auto' finds in the run; set "
                "'train.max_steps', or 'keep_fraction' to a number"
            )
        if selector not in GRADIENT_SELECTORS:
            return self
        if not ADAPTER_TRAITS[self.adapter.type].scored:
            raise ValueError(
                f"'sampling.selector: {selector}' needs gradients by sample, and 'adapter.type: {self.adapter.type}' "
                "has none that are exact; set 'sampling.selector: full' or 'adapter.type: lora'"
            )
        if ADAPTER_TRAITS[self.adapter.type].triplets and self.scoring.warmup_steps == 0:
            raise ValueError(
                f"'scoring.warmup_steps' is 0, and the diagonal of 'adapter.type: {self.adapter.type}' starts at zero: "
                "no sample has a gradient then; give some steps"
            )
        if self.scoring.include_head and not self.adapter.train_head:
            raise ValueError(
                "'scoring.include_head' scores by the head's gradients, and 'adapter.train_head: false' does not train "
                "it; turn one of them off"
            )
        if self.sampling.redundancy and self.scores_online:
            raise ValueError(
                "'sampling.redundancy' compares gradients, and 'scoring.source: online' keeps none; "
                "set 'scoring.source: pass' or 'sampling.redundancy: 0'"
            )
        if selector == "quality" and self.sampling.redundancy and self.scoring.convergence == "loss_trend":
            raise ValueError(
                "'sampling.redundancy' compares gradients, and 'scoring.convergence: loss_trend' keeps none; "
                "set 'scoring.convergence: alignment' or 'sampling.redundancy: 0'"
            )
        return self

    @model_validator(mode="after")
    def _selector_fits(self) -> Config:
        """What the papers' selectors need of task and model."""
        selector, kind = self.sampling.selector, self.task.type
        fits = {"el2n": ("classification",), "rho": ("classification", "regression")}.get(selector)
        if fits is not None and kind not in fits:
            raise ValueError(
                f"'sampling.selector: {selector}' is for answers that are "
                f"{' or '.join(ANSWERS[each] for each in fits)}, and 'task.type' is {kind!r}; choose another selector"
            )
        warmed_up = self.looks_at_pool and not self.looks_before_training and not self.scores_data
        if warmed_up and self.scoring.proxy_model is not None:
            raise ValueError(
                f"'scoring.proxy_model' scores for 'sampling.selector: quality' alone, and it is {selector!r}; set it "
                "to null"
            )
        return self

    @model_validator(mode="after")
    def _packs_texts(self) -> Config:
        if self.train.packing and self.task.type != "causal":
            raise ValueError(
                f"'train.packing: true' lays texts of causal models end to end, and 'task.type' is {self.task.type!r}; "
                "set it to false (train.group_by_length saves padding, too)"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_has_data(self) -> Config:
        if self.train.eval_every and not self.task.has_dev:
            raise ValueError(
                f"'train.eval_every' is {self.train.eval_every}, but there is nothing to evaluate on; "
                "set 'task.dataset.dev_file', or 'dev_split' of a hub dataset"
            )
        for key in ("keep", "patience"):
            if getattr(self.train, key) not in ("last", "average", None) and not self.train.eval_every:
                raise ValueError(
                    f"'train.{key}' is {getattr(self.train, key)!r}, but there are no evaluations while it trains; "
                    f"set 'train.eval_every', or remove it"
                )
        return self

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.run.output_dir) / self.run.name

    def of_proxy(self) -> Config:
        """The scoring run of ``scoring.proxy_model``, in the run folder ``NAME-proxy``."""
        name, model = f"{self.run.name}-proxy", self.scoring.proxy_model
        return self.model_copy(
            update={
                "run": self.run.model_copy(update={"name": name}),
                "model": self.model.model_copy(
                    update={"name_or_path": model, "revision": None, "quantization": "none", "quant_storage": "uint8"}
                ),
                "adapter": self.adapter.model_copy(
                    update={"target_modules": "auto", "layers": None, "init_from": None}
                ),
                "scoring": self.scoring.model_copy(update={"proxy_model": None}),
                **self._nothing_but_scores(),
            }
        )

    def of_pretraining(self) -> Config:
        """The run before this one, on plain text (``pretrain``), in the run folder ``NAME-pretrain``."""
        nothing_else = self.for_audit()
        return nothing_else.model_copy(update=pretraining_sections(self, nothing_else))

    def with_labels(self, labels: list[str] | int | None) -> Config:
        """The same run with the classes that the data has, where the config names none."""
        if labels == self.task.labels:
            return self
        return self.model_copy(update={"task": self.task.model_copy(update={"labels": labels})})

    def for_scoring(self) -> Config:
        """The same run up to its first pass over the pool, whose raw numbers stay; nothing else happens in it."""
        return self.model_copy(
            update={
                "scoring": self.scoring.model_copy(update={"keep_sketches": True}),
                **self._nothing_but_scores(),
            }
        )

    def for_audit(self) -> Config:
        """The same run as an audit takes it: even draws, fixed ranks, no evaluations, no scores."""
        return self.model_copy(
            update={
                **self._nothing_but_scores(),
                "sampling": self.sampling.model_copy(
                    update={"selector": "full", "keep_fraction": 1.0, "redundancy": 0.0, "unbiased": False}
                ),
            }
        )

    @property
    def audits_features(self) -> bool:
        """Whether an audit judges by the frozen base's features."""
        labelled = self.task.type in ("classification", "regression")
        return self.scoring.audit in ("features", "both") or (self.scoring.audit == "auto" and labelled)

    @property
    def audits_adapters(self) -> bool:
        """Whether an audit trains adapters."""
        labelled = self.task.type in ("classification", "regression")
        return self.scoring.audit in ("adapters", "both") or (self.scoring.audit == "auto" and not labelled)

    def _nothing_but_scores(self) -> dict[str, Section]:
        """Sections of a run that ends with its first pass over the pool."""
        return {
            "pretrain": PretrainConfig(),
            "allocation": self.allocation.model_copy(update={"policy": "fixed", "file": None, "budget": "fixed"}),
            "train": self.train.model_copy(
                update={
                    "checkpoint_every": None,
                    "eval_every": None,
                    "keep": "last",
                    "patience": None,
                    "average_last": None,
                    "average_every": None,
                    "distill": None,
                }
            ),
        }

    @property
    def pretrains(self) -> bool:
        """Whether plain text comes first (``pretrain``)."""
        return self.pretrain.objective is not None

    @property
    def runs_before(self) -> list[Config]:
        """The runs in run folders of their own that come before this one."""
        return [
            *([self.of_pretraining()] if self.pretrains else []),
            *([self.of_proxy()] if self.scores_by_proxy else []),
        ]

    @property
    def scores_data(self) -> bool:
        """Whether the data half of the method is on."""
        return bool(self.sampling.selector == "quality")

    @property
    def looks_at_pool(self) -> bool:
        """Whether a selector of ours looks at samples through a model, or at what is known of them."""
        return self.sampling.selector in SELECTORS and self.sampling.selector not in BLIND_SELECTORS

    @property
    def looks_before_training(self) -> bool:
        """Whether the selector looks at the pool before the first step, by forward passes alone."""
        return self.sampling.selector in FORWARD_SELECTORS

    @property
    def finds_size(self) -> bool:
        """Whether the selector finds in the run how many samples are worth training on."""
        found = set(FORWARD_SELECTORS) & set(SIZING_SELECTORS)
        return self.sampling.keep_fraction == "auto" and self.sampling.selector in found

    @property
    def stratifies(self) -> bool:
        """Whether p is taken within labels (``sampling.stratify``), and within the sets of a mixture with shares."""
        if self.sampling.stratify == "auto":
            grouped = self.task.type == "classification" or self.task.asks_for_shares
            return self.scores_data and grouped and self.scoring.preset != "paper"
        return self.sampling.stratify

    @property
    def scores_by_proxy(self) -> bool:
        """Whether another model scores (``scoring.proxy_model``)."""
        return self.scores_data and self.scoring.proxy_model is not None

    @property
    def scores_online(self) -> bool:
        """Whether the training steps score the pool (``scoring.source: online``)."""
        return self.scores_data and self.scoring.source == "online"

    @property
    def refreshes_scores(self) -> bool:
        """Whether scores are taken anew at schedule events."""
        return self.scores_data and self.scoring.refresh != "none"

    @property
    def adapts_ranks(self) -> bool:
        """Whether the rank half of the method is on."""
        return self.allocation.policy not in ("fixed", "file")

    def to_yaml(self) -> str:
        """The resolved config; training from this text reproduces the run."""
        return OmegaConf.to_yaml(OmegaConf.create(_escaped(self.model_dump(mode="json"))))


def _escaped(tree: Any) -> Any:
    """Strings that hold ``${`` after interpolation, written so that reading them does not interpolate again."""
    if isinstance(tree, dict):
        return {key: _escaped(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_escaped(value) for value in tree]
    if isinstance(tree, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", tree)
    return tree
