"""Where rank goes (paper 2.2 and 2.3): sensitivity, schedule, allocation, resizing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tsqlora_scale.config.fields import Below1, PositiveFloat, PositiveInt, Section, StepsOrFraction, name_or_extension

#: Policies that say themselves which components stay.
COMPONENT_POLICIES = ("adalora", "elalora")
#: AdaLoRA begins with so many times the rank that it ends with.
INITIAL_FACTOR = 1.5


class SensitivityConfig(Section):
    """Layer sensitivity (paper 2.2, Eq. 3 and 4)."""

    #: ``weight``: Eq. 3 on gradients of groups of samples; ``weight_per_sample``: of single ones; ``fisher``: the trace
    #: of Eq. 4; ``adapter``: from the factors' own gradients (docs/method.md).
    estimator: Literal["weight", "weight_per_sample", "fisher", "adapter"] = "weight"
    #: Every how many optimizer steps one takes part in the statistic, counted back from an event …
    every: PositiveInt = 1
    #: … and how many steps before it at most; none: all of them, and so with ``adalora`` and ``elalora``, unless set.
    window: PositiveInt | None = 10
    #: Samples of such a step that enter the statistic at most, spaced evenly over the global batch; none: all.
    #: ``resize.grow_init: gradient`` listens to all of them.
    max_samples: PositiveInt | None = 8
    #: Share of the moving average that stays when a step enters it.
    beta: Below1 = 0.85
    #: AdaLoRA's smoothing: S times the average of its own fluctuation, whose beta this is (AdaLoRA: 0.85). None: S.
    #: 0.85 with ``adalora`` and ``elalora``, unless set.
    uncertainty: Below1 | None = None
    #: Samples whose gradients are summed before the absolute value. ``auto`` is 1, Eq. 3 to the letter: the one size
    #: that every micro batch is a multiple of, so that accumulation never changes the ranks (and costs no more).
    group_size: PositiveInt | Literal["auto"] = "auto"


class ScheduleConfig(Section):
    """When ranks change: every ``every`` steps from ``start`` to ``end``, in steps or fractions of the run."""

    #: The first step after which ranks change.
    start: StepsOrFraction = 0.2
    #: The last step after which they may.
    end: StepsOrFraction = 0.8
    #: Steps from one change to the next.
    every: PositiveInt | Annotated[float, Field(gt=0, lt=1)] = 0.1


class AllocationConfig(Section):
    """How a rank budget is divided among layers (paper 2.3, Eq. 6)."""

    #: ``tsqlora``: Eq. 6; ``gain``: every rank where a local model of the loss says that it lowers it most
    #: (docs/method.md); ``adalora``: of all components the most important stay, ever fewer; ``elalora``: the least
    #: important ones go where the most important ones are; ``fixed``: ranks stay as they are, and nothing is listened
    #: to; ``file``: likewise, from the ranks of ``file`` on; or a policy of one's own, ``FILE.py:NAME`` or
    #: ``package.module:NAME``.
    policy: name_or_extension("tsqlora", "gain", "adalora", "elalora", "fixed", "file") = "tsqlora"  # type: ignore[valid-type]
    #: The ranks of ``policy: file``: a run folder, its ``result.json``, an adapter's folder or ``adapter_config.json``,
    #: or a yaml or json file of names and ranks, as PEFT's ``rank_pattern`` has them. Layers that it does not name
    #: have the ``r`` of an adapter's file, where it is one, else ``adapter.r``.
    file: Annotated[str, Field(min_length=1)] | None = None
    #: ``fixed``: the ranks at the start, times φ. ``auto``, with ``policy: gain``: the run finds the total as well, the
    #: fewest ranks that leave no more than ``tolerance`` of what is to be gained …
    budget: Literal["fixed", "auto"] = "fixed"
    #: … as a share of it, and …
    tolerance: Below1 = 0.1
    #: … no more than so many times the ranks at the start.
    ceiling: PositiveFloat = 4.0
    #: Mean rank that ``adalora`` ends with; none: r / 1.5, rounded.
    target_r: PositiveInt | None = None
    #: b of ``elalora``: components that change their layer at the first event; ever fewer, none at the last.
    moves: PositiveInt = 4
    #: k of ``elalora``: so many of each layer's least important components take part.
    candidates: PositiveInt = 2
    #: 0 lets a layer lose its adapter altogether; it gets one again when its sensitivity earns it a rank (with
    #: ``sensitivity.estimator: adapter``, which then hears nothing of it, only when all others are full; with
    #: ``adalora`` and ``elalora`` never). 0 with ``adalora``, unless set.
    r_min: Annotated[int, Field(ge=0)] = 1
    #: None means 4 r, with ``budget: auto`` ``ceiling`` r where that is more.
    r_max: PositiveInt | None = None
    #: Most ranks that a layer may gain or lose at an event; none: any number.
    max_change: PositiveInt | None = None
    #: Smallest φ: the mean quality of S over its first one, which scales the budget at every event.
    phi_min: PositiveFloat = 0.5
    #: Largest φ.
    phi_max: PositiveFloat = 1.5
    #: What the budget counts: ranks, or parameters, of which a rank of a layer takes d_in + d_out.
    budget_unit: Literal["rank", "params"] = "rank"

    def adalora_target(self, r: float) -> int:
        """The mean rank that ``adalora`` ends with, of ``r`` at the start."""
        return self.target_r or max(round(r / INITIAL_FACTOR), 1)

    @model_validator(mode="after")
    def _bounds_in_order(self) -> AllocationConfig:
        if self.r_max is not None and self.r_max < self.r_min:
            raise ValueError(f"'r_max' ({self.r_max}) must not be below 'r_min' ({self.r_min})")
        if self.phi_max < self.phi_min:
            raise ValueError(f"'phi_max' ({self.phi_max}) must not be below 'phi_min' ({self.phi_min})")
        if self.budget == "auto" and self.policy != "gain":
            raise ValueError(f"'budget: auto' needs 'policy: gain', and it is {self.policy!r}; change one of them")
        if (self.file is None) == (self.policy == "file"):
            raise ValueError(
                "'policy: file' needs 'file', the ranks to take"
                if self.file is None
                else f"'file' is read by 'policy: file' alone, and it is {self.policy!r}; change one of them"
            )
        return self


class ResizeConfig(Section):
    """How factors grow and shrink."""

    #: New rows of A: orthogonal to the present ones; any; or, orthogonal to them too, the directions in which the
    #: weight's gradient is largest.
    grow_init: Literal["orthogonal", "gaussian", "gradient"] = "orthogonal"
    #: What stays of a layer: ``svd``, the best approximation of B A; ``importance``, the components whose products of
    #: factors and gradients are largest, as they are.
    shrink: Literal["svd", "importance"] = "svd"
