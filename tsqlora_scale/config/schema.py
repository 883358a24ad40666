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

from tsqlora_scale.config.agreements import check_agreements
from tsqlora_scale.config.dataset_section import DatasetConfig
from tsqlora_scale.config.fields import Section
from tsqlora_scale.config.model_section import AdapterConfig, ModelConfig
from tsqlora_scale.config.presets import from_0_1, with_preset
from tsqlora_scale.config.pretrain_section import PretrainConfig, pretraining_sections
from tsqlora_scale.config.quality_sections import (
    BLIND_SELECTORS,
    FORWARD_SELECTORS,
    ONE_SIDED_SELECTORS,
    SELECTORS,
    SIZING_SELECTORS,
    SamplingConfig,
    ScoringConfig,
)
from tsqlora_scale.config.rank_sections import (
    AllocationConfig,
    ResizeConfig,
    ScheduleConfig,
    SensitivityConfig,
)
from tsqlora_scale.config.task_section import TaskConfig
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
    def _sections_agree(self) -> Config:
        check_agreements(self)
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
                "task": self.task.model_copy(update={"prompt_base": None}),  # it may be of another kind
                **self._nothing_but_scores(),
            }
        )

    def of_pretraining(self) -> Config:
        """The run before this one, on plain text (``pretrain``), in the run folder ``NAME-pretrain``."""
        nothing_else = self.for_audit()
        return nothing_else.model_copy(update=pretraining_sections(self, nothing_else))

    def with_labels(self, labels: list[str] | int | None) -> Config:
        """The same run with the classes that the data has, where the config names none."""
        return self.with_task(labels=labels)

    def with_task(self, **values: Any) -> Config:
        """The same run with keys of the task that have been found out: its classes, what its prompt is made of."""
        if all(getattr(self.task, key) == value for key, value in values.items()):
            return self
        return self.model_copy(update={"task": self.task.model_copy(update=values)})

    def for_scoring(self) -> Config:
        """The same run up to its first pass over the pool, whose raw numbers stay; nothing else happens in it."""
        sections = self._nothing_but_scores()
        if self.allocation.policy == "file":  # whose ranks are those that training starts with
            sections["allocation"] = self.allocation
        scoring = self.scoring.model_copy(update={"keep_sketches": True})
        return self.model_copy(update={"scoring": scoring, **sections})

    def for_audit(self) -> Config:
        """The same run as an audit takes it: even draws, fixed ranks, no evaluations, no scores."""
        return self.model_copy(
            update={
                **self._nothing_but_scores(),
                "sampling": self.sampling.model_copy(
                    update={
                        "selector": "full",
                        "keep_fraction": 1.0,
                        "redundancy": 0.0,
                        "unbiased": False,
                        "use": "draw",
                        "file": None,
                    }
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
    def chooses_within_labels(self) -> bool:
        """Whether a selector that rates the pool once takes the best of every label (``sampling.stratify``)."""
        if self.sampling.stratify == "auto":
            is_mean = self.sampling.selector != "less" or self.sampling.less == "mean"  # other forms are not one-sided
            return self.task.type == "classification" and self.sampling.selector in ONE_SIDED_SELECTORS and is_mean
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
