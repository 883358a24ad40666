"""The run, as typed data: YAML, then ``section.key=value``, checked before torch is imported.

Every key that a config file may hold is a field below. Unknown keys are errors that name the
nearest known one. Checks that need the data, the model's config or the machine live in
:mod:`tsqlora_scale.run.preflight`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, model_validator

#: No count of anything here needs more, and arrays of indices hold it.
LARGEST = 2**31 - 1
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
UnitInterval = Annotated[float, Field(gt=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
#: Optimizer steps, or a fraction of the run when strictly between 0 and 1.
StepsOrFraction = Annotated[int, Field(ge=0, le=LARGEST)] | Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A config section: unknown keys are errors, values are immutable once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), strict=True)


class RunConfig(Section):
    """Where the run is written, and the seed that everything random derives from."""

    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    output_dir: str = "runs"
    seed: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    #: How long ranks wait for one another, before a run with a rank that hangs ends.
    timeout_minutes: PositiveFloat = 10.0


class ModelConfig(Section):
    """The frozen base model."""

    #: A hub name, a folder, or ``package:NAME/sub/folder`` (a folder inside an installed package).
    name_or_path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    #: Storage and compute type of the base; the LoRA factors are float32 in any case.
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    quantization: Literal["none", "nf4"] = "none"
    #: Storage type of packed 4-bit weights; a float type lets sharding engines treat them as ordinary tensors.
    quant_storage: Literal["uint8", "bf16", "fp32"] = "uint8"
    gradient_checkpointing: bool = False
    #: One value for every dropout of the base; none leaves the model's own.
    dropout: Below1 | None = None
    trust_remote_code: bool = False


class DatasetConfig(Section):
    """The pool and the held-out set: a hub dataset (``name``) or a local folder (``path``)."""

    #: A folder, or ``package:NAME/sub/folder``.
    path: str | None = None
    train_file: str | None = None
    dev_file: str | None = None
    #: A hub dataset and its subset.
    name: str | None = None
    subset: str | None = None
    train_split: str = "train"
    #: None where the hub dataset has no such split.
    dev_split: str | None = "validation"
    #: Column names of csv/tsv files that have no header row.
    column_names: list[str] | None = None
    #: A column with unique sample ids; without it the id is the row's number in the pool.
    id_column: str | None = None
    #: Leave out rows with an empty text instead of refusing the data.
    drop_empty: bool = False
    #: A random subset of that size, fixed by ``run.seed``: files are often sorted.
    max_train_samples: PositiveInt | None = None
    max_dev_samples: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_source(self) -> DatasetConfig:
        if (self.path is None) == (self.name is None):
            raise ValueError("needs exactly one of 'path' (a local folder) and 'name' (a hub dataset)")
        if self.path is not None and self.train_file is None:
            raise ValueError("'path' needs 'train_file', the training file inside it")
        return self


class TaskConfig(Section):
    """What the model learns: columns, lengths, metrics."""

    type: Literal["classification", "regression", "seq2seq", "causal"]
    dataset: DatasetConfig
    #: One or two text columns (classification, regression).
    text: list[str] = []
    label: str | None = None
    #: Class names in label order, or their number; required for classification.
    labels: list[str] | PositiveInt | None = None
    #: Input and output columns (seq2seq, causal).
    source: str | None = None
    target: str | None = None
    #: Text put before every source (T5-style).
    prefix: str = ""
    max_length: PositiveInt = 128
    max_target_length: PositiveInt = 64
    #: Metric names; the first is the one that decides which checkpoint is best.
    metrics: Annotated[list[str], Field(min_length=1)]
    num_beams: PositiveInt = 4

    @model_validator(mode="after")
    def _columns_of_the_type(self) -> TaskConfig:
        if self.type in ("classification", "regression"):
            if not 1 <= len(self.text) <= 2:
                raise ValueError(f"'text' must name one or two columns for a {self.type} task, got {self.text!r}")
            if self.label is None:
                raise ValueError(f"'label' must name the label column of a {self.type} task")
            if self.type == "classification" and self.labels is None:
                raise ValueError("'labels' must give the class names, or their number, of a classification task")
        elif self.source is None or self.target is None:
            raise ValueError(f"'source' and 'target' must name the input and output columns of a {self.type} task")
        return self

    @property
    def num_labels(self) -> int:
        """Size of the head: classes, or 1 for regression. 0 where there is no head."""
        if self.type == "regression":
            return 1
        if self.labels is None:
            return 0
        return self.labels if isinstance(self.labels, int) else len(self.labels)


class AdapterConfig(Section):
    """The LoRA layers. ``lora``, ``rslora`` and ``dora`` are PEFT's own, on uniform samples and fixed ranks."""

    method: Literal["tsqlora", "lora", "rslora", "dora"] = "tsqlora"
    r: PositiveInt = 8
    #: The scaling s = alpha / r stays constant when ranks change (METHOD: rescaling harms).
    alpha: PositiveFloat = 16.0
    dropout: Below1 = 0.0
    #: Module-name suffixes, or ``auto``: every linear layer of attention and feed-forward blocks.
    target_modules: list[str] | Literal["auto"] = "auto"


class ScoringConfig(Section):
    """Per-sample quality scores (paper 2.1, Eq. 1 and 2)."""

    enabled: bool = True
    #: Optimizer steps on uniform samples before the pool is scored: at step 0, B = 0 and scores are blind.
    warmup_steps: StepsOrFraction = 0.1
    #: ``paper`` is Eq. 1 with equal weights, to the letter; ``aligned`` leads with the convergence term.
    preset: Literal["paper", "aligned"] = "aligned"
    #: (alpha_1, alpha_2, alpha_3) for gradient norm, loss reduction, convergence; overrides ``preset``.
    weights: Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=3, max_length=3)] | None = (
        None
    )
    #: Step size of the loss reduction; none means ``train.lr``.
    eta: PositiveFloat | None = None
    delta_loss: Literal["exact", "first_order"] = "exact"
    convergence: Literal["alignment", "loss_trend", "target"] = "alignment"
    #: The direction of ``alignment``: the mean of the samples' gradients, or of their gradients scaled to unit length,
    #: in which large ones have no larger say. ``auto`` is unit, but for ``preset: paper``, which is to the letter.
    mean_gradient: Literal["auto", "plain", "unit"] = "auto"
    #: ``linear``: the more a sample's gradient agrees with the others, the better. ``gate``: samples that pull against
    #: the others are worse, the others equal. ``auto`` is gate, but for ``preset: paper`` and for ``loss_trend``.
    convergence_form: Literal["auto", "linear", "gate"] = "auto"
    sketch_dim: Annotated[int, Field(ge=16, le=2**20)] = 512
    #: Samples per rank and forward. ``auto`` measures what fits; after an allocation failure it goes on with half.
    batch_size: PositiveInt | Literal["auto"] = "auto"
    #: Samples after which the numbers of a pass are written, so that a killed pass goes on from there.
    shard_size: PositiveInt = 4096
    #: Leave the raw numbers and the sketches of the last pass (4 sketch_dim bytes a sample) in ``scores/parts``.
    keep_sketches: bool = False
    #: Score a uniform subsample and give the rest the mean score.
    max_samples: PositiveInt | None = None
    max_length: PositiveInt | None = None
    #: A smaller model that scores the pool in the place of the one that is trained: a hub name or folder, as
    #: ``model.name_or_path``. It scores once, before training, and needs ``refresh: none``.
    proxy_model: Annotated[str, Field(min_length=1)] | None = None
    #: When scores are taken anew: never, at every schedule event, or at every N-th.
    refresh: Literal["none", "every_event"] | PositiveInt = "every_event"
    #: Share of S that a refresh scores; the rest keep their last score.
    refresh_fraction: UnitInterval = 0.1
    #: Count the head's gradient among theta.
    include_head: bool = False

    @model_validator(mode="after")
    def _proxy_scores_once(self) -> ScoringConfig:
        if self.proxy_model is not None and self.refresh != "none":
            raise ValueError(
                f"'proxy_model' scores once, before training, and 'refresh' is {self.refresh!r}; set 'refresh: none'"
            )
        return self

    @property
    def gates_convergence(self) -> bool:
        """``convergence_form``, decided."""
        if self.convergence_form == "auto":
            return self.preset != "paper" and self.convergence != "loss_trend"
        return self.convergence_form == "gate"

    @property
    def takes_unit_mean(self) -> bool:
        """``mean_gradient``, decided."""
        return self.mean_gradient == "unit" or (self.mean_gradient == "auto" and self.preset != "paper")


class SamplingConfig(Section):
    """Which samples are trained on, and how often (Algorithm 1, lines 4 and 9)."""

    selector: Literal["quality", "random", "full"] = "quality"
    tau: PositiveFloat = 0.7
    keep_fraction: UnitInterval = 1.0
    replacement: bool = True
    #: Classification: Eq. 2 within every label, so that each keeps its share of the draws. ``auto`` is yes, but for
    #: ``scoring.preset: paper``, which is to the letter.
    stratify: Literal["auto"] | bool = "auto"
    #: p_i is divided by this power of the number of samples that teach the same as i, itself included. 0: by nothing.
    redundancy: NonNegativeFloat = 0.0
    #: Cosine of two samples' gradients from which on they teach the same.
    similarity: UnitInterval = 0.98
    #: Weigh the losses of drawn samples by 1 / (|S| p_i), normalised within the step: the objective is then the mean
    #: loss over S, as with uniform draws, and p decides only which gradients estimate it.
    unbiased: bool = False
    #: Largest such weight; 1 is that of a sample drawn as often as by uniform draws.
    max_weight: PositiveFloat = 10.0


class SensitivityConfig(Section):
    """Layer sensitivity (paper 2.2, Eq. 3 and 4)."""

    enabled: bool = True
    estimator: Literal["weight", "weight_per_sample", "fisher", "adapter"] = "weight"
    #: Every how many optimizer steps one takes part in the statistic, counted back from an event …
    every: PositiveInt = 1
    #: … and how many steps before it at most; none: all of them.
    window: PositiveInt | None = 10
    #: Samples of such a step that enter the statistic at most, spaced evenly over the global batch; none: all.
    #: ``resize.grow_init: gradient`` listens to all of them.
    max_samples: PositiveInt | None = 8
    beta: Below1 = 0.85
    #: AdaLoRA's smoothing: S times the average of its own fluctuation, whose beta this is (AdaLoRA: 0.85). None: S.
    uncertainty: Below1 | None = None
    #: Samples whose gradients are summed before the absolute value. ``auto`` is 1, Eq. 3 to the letter: the one size
    #: that every micro batch is a multiple of, so that accumulation never changes the ranks (and costs no more).
    group_size: PositiveInt | Literal["auto"] = "auto"


class ScheduleConfig(Section):
    """When ranks change: every ``every`` steps from ``start`` to ``end``, in steps or fractions of the run."""

    start: StepsOrFraction = 0.2
    end: StepsOrFraction = 0.8
    every: PositiveInt | Annotated[float, Field(gt=0, lt=1)] = 0.1


class AllocationConfig(Section):
    """How a rank budget is divided among layers (paper 2.3, Eq. 6)."""

    #: 0 lets a layer lose its adapter altogether; it gets one again when its sensitivity earns it a rank (with
    #: ``sensitivity.estimator: adapter``, which then hears nothing of it, only when all others are full).
    r_min: Annotated[int, Field(ge=0)] = 1
    #: None means 4 r.
    r_max: PositiveInt | None = None
    #: Most ranks that a layer may gain or lose at an event; none: any number.
    max_change: PositiveInt | None = None
    phi_min: PositiveFloat = 0.5
    phi_max: PositiveFloat = 1.5
    budget_unit: Literal["rank", "params"] = "rank"

    @model_validator(mode="after")
    def _bounds_in_order(self) -> AllocationConfig:
        if self.r_max is not None and self.r_max < self.r_min:
            raise ValueError(f"'r_max' ({self.r_max}) must not be below 'r_min' ({self.r_min})")
        if self.phi_max < self.phi_min:
            raise ValueError(f"'phi_max' ({self.phi_max}) must not be below 'phi_min' ({self.phi_min})")
        return self


class ResizeConfig(Section):
    """How factors grow and shrink."""

    #: New rows of A: orthogonal to the present ones; any; or, orthogonal to them too, the directions in which the
    #: weight's gradient is largest.
    grow_init: Literal["orthogonal", "gaussian", "gradient"] = "orthogonal"
    shrink: Literal["svd", "importance"] = "svd"


class TrainConfig(Section):
    """Optimization. ``batch_size`` is the global batch of one optimizer step."""

    max_steps: PositiveInt | None = None
    #: Passes over the samples trained on (S, not the pool).
    epochs: PositiveFloat | None = None
    batch_size: PositiveInt = 32
    #: At most so many samples per rank and backward pass; none, or more than a rank's share, means
    #: batch_size / ranks (no accumulation).
    micro_batch_size: PositiveInt | None = None
    eval_batch_size: PositiveInt = 64
    lr: PositiveFloat = 5e-4
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    lr_warmup: StepsOrFraction = 0
    weight_decay: NonNegativeFloat = 0.0
    betas: Annotated[list[Below1], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: PositiveFloat = 1e-8
    #: None disables clipping.
    max_grad_norm: PositiveFloat | None = 1.0
    #: A step whose loss or gradient is not finite is left out, and its samples are logged; more of them than this end
    #: the run. Steps that fp16's loss scaler leaves out while it looks for its scale do not count.
    max_nonfinite: Annotated[int, Field(ge=0)] = 10
    checkpoint_every: PositiveInt | None = None
    checkpoint_keep: PositiveInt = 2
    #: Optimizer steps between evaluations; none evaluates before and after training only.
    eval_every: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("needs exactly one of 'max_steps' and 'epochs'")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"'batch_size' ({self.batch_size}) must be a multiple of 'micro_batch_size' ({self.micro_batch_size})"
            )
        return self


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
    train: TrainConfig

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        r_max = self.allocation.r_max
        if self.adapts_ranks and not (self.allocation.r_min <= self.adapter.r <= (r_max or self.adapter.r)):
            raise ValueError(
                f"'adapter.r' ({self.adapter.r}) must lie between 'allocation.r_min' ({self.allocation.r_min}) "
                f"and 'allocation.r_max' ({r_max})"
            )
        if self.adapts_ranks and self.resize.grow_init == "gradient" and self.sensitivity.estimator == "adapter":
            raise ValueError(
                "'resize.grow_init: gradient' needs the gradients of the base's weights, which "
                "'sensitivity.estimator: adapter' does not see; choose another of either"
            )
        if self.adapter.method == "tsqlora" and self.sampling.selector == "quality" and not self.scoring.enabled:
            raise ValueError(
                "'sampling.selector: quality' needs 'scoring.enabled: true'; "
                "to switch quality off set 'sampling.selector: full'"
            )
        if self.sampling.stratify is True and self.task.type != "classification":
            raise ValueError(
                f"'sampling.stratify: true' needs labels, but 'task.type' is {self.task.type!r}; remove it"
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
                "adapter": self.adapter.model_copy(update={"target_modules": "auto"}),
                "scoring": self.scoring.model_copy(update={"proxy_model": None}),
                "sensitivity": self.sensitivity.model_copy(update={"enabled": False}),
                "train": self.train.model_copy(update={"checkpoint_every": None, "eval_every": None}),
            }
        )

    @property
    def scores_data(self) -> bool:
        """Whether the data half of the method is on."""
        return self.adapter.method == "tsqlora" and self.scoring.enabled and self.sampling.selector == "quality"

    @property
    def stratifies(self) -> bool:
        """Whether p is taken within labels (``sampling.stratify``)."""
        if self.sampling.stratify == "auto":
            return self.task.type == "classification" and self.scoring.preset != "paper"
        return self.sampling.stratify

    @property
    def scores_by_proxy(self) -> bool:
        """Whether another model scores (``scoring.proxy_model``)."""
        return self.scores_data and self.scoring.proxy_model is not None

    @property
    def refreshes_scores(self) -> bool:
        """Whether scores are taken anew at schedule events."""
        return self.scores_data and self.scoring.refresh != "none"

    @property
    def adapts_ranks(self) -> bool:
        """Whether the rank half of the method is on."""
        return self.adapter.method == "tsqlora" and self.sensitivity.enabled

    def to_yaml(self) -> str:
        """The resolved config; training from this text reproduces the run."""
        return OmegaConf.to_yaml(OmegaConf.create(_escaped(self.model_dump(mode="json"))))


def as_steps(value: int | float, total: int) -> int:
    """A number of optimizer steps from steps or a fraction of ``total``."""
    return value if isinstance(value, int) else math.ceil(round(value * total, 6))  # 0.55 * 100 is 55, not 56


def _escaped(tree: Any) -> Any:
    """Strings that hold ``${`` after interpolation, written so that reading them does not interpolate again."""
    if isinstance(tree, dict):
        return {key: _escaped(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_escaped(value) for value in tree]
    if isinstance(tree, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", tree)
    return tree
