"""Where a run is written, and how it is optimized."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tsqlora_scale.config.fields import (
    LARGEST,
    Below1,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    StepsOrFraction,
    UnitInterval,
)


class RunConfig(Section):
    """Where the run is written, and the seed that everything random derives from."""

    #: The run folder's name below ``output_dir``.
    name: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    #: The folder of run folders, made where it is not there; a relative one is below the current folder.
    output_dir: str = "runs"
    #: Of all that is drawn at random: new weights, dropout, the samples of a step, ``max_train_samples``.
    seed: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    #: How long ranks wait for one another, before a run with a rank that hangs ends.
    timeout_minutes: PositiveFloat = 10.0
    #: Kernels that give the same bits in every run on the same GPUs, some of them slower; an operation without one ends
    #: the run. On a CPU runs are the same to the bit in any case.
    deterministic: bool = False


class DistillConfig(Section):
    """Self-distillation, against the average of the run's own last parameters."""

    #: Of the mean squared error between the model's logits and those of the average, beside the loss.
    weight: PositiveFloat = 1.0


class TrainConfig(Section):
    """Optimization. ``batch_size`` is the global batch of one optimizer step."""

    #: Length of the run in optimizer steps; exactly one of this and ``epochs`` is needed.
    max_steps: PositiveInt | None = None
    #: Passes over the samples trained on (S, not the pool).
    epochs: PositiveFloat | None = None
    #: Samples of one optimizer step, over all ranks and micro-batches.
    batch_size: PositiveInt = 32
    #: At most so many samples per rank and backward pass; none, or more than a rank's share, means
    #: batch_size / ranks (no accumulation).
    micro_batch_size: PositiveInt | None = None
    #: Put the samples of a step in order of length, the longest first, before they are cut into micro-batches: less is
    #: computed on padding. The step's loss is the same; which samples share a forward pass, and so masks of dropout, is
    #: not.
    group_by_length: bool = True
    #: Lay the samples of a micro-batch end to end in few rows, in the place of a row each that is padded to the longest
    #: (causal models whose forward takes positions; the model is tried out first). No token sees one of another sample,
    #: and every sample's loss and gradient are the same; masks of dropout are not.
    packing: bool = False
    #: Samples per rank and forward pass of evaluations and predictions.
    eval_batch_size: PositiveInt = 64
    #: The learning rate at its highest, after ``lr_warmup``.
    lr: PositiveFloat = 5e-4
    #: From there to the end of the run: down to 0 in a line or along a cosine, or unchanged.
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    #: Optimizer steps in which the learning rate rises to ``lr``, in equal parts.
    lr_warmup: StepsOrFraction = 0
    #: Learning rates that decrease from the top down: the block below takes so much of the learning rate of the block
    #: above it; the uppermost one and the head take all of it, embeddings the least (docs/recipes.md). 1: one for all.
    lr_decay: UnitInterval = 1.0
    #: AdamW's decay, on everything that is trained.
    weight_decay: NonNegativeFloat = 0.0
    #: AdamW's averages: of gradients, of their squares.
    betas: Annotated[list[Below1], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    #: AdamW's term that keeps the divisor from 0.
    eps: PositiveFloat = 1e-8
    #: None disables clipping.
    max_grad_norm: PositiveFloat | None = 1.0
    #: A step whose loss or gradient is not finite is left out, and its samples are logged; more of them than this end
    #: the run. Steps that fp16's loss scaler leaves out while it looks for its scale do not count.
    max_nonfinite: Annotated[int, Field(ge=0)] = 10
    #: Optimizer steps between checkpoints; none writes one before the first scoring pass, after a better
    #: evaluation, on a stop, and at the end.
    checkpoint_every: PositiveInt | None = None
    #: How many of the newest checkpoints stay, beside the best one.
    checkpoint_keep: PositiveInt = 2
    #: Optimizer steps between evaluations; none evaluates before and after training only.
    eval_every: PositiveInt | None = None
    #: Evaluate before the first step, too; false saves that time where generating answers is slow.
    eval_on_start: bool = True
    #: What ``adapter/`` holds at the end, and ``metrics`` of the result are of: the last step, the best evaluation, or
    #: the average of ``average_last``.
    keep: Literal["last", "best", "average"] = "last"
    #: Average what was trained after so many of the last snapshots, products BA and not factors; it is evaluated at the
    #: end beside the last step (docs/recipes.md). Every rank holds the snapshots in the host's memory.
    average_last: PositiveInt | None = None
    #: Optimizer steps between snapshots; none: ``eval_every``, or else ``checkpoint_every``.
    average_every: PositiveInt | None = None
    #: Self-distillation: from the first snapshot on, learn from the logits of the average of ``average_last`` too.
    distill: DistillConfig | None = None
    #: Evaluations in a row that bring no better one, after which training ends; none: it goes on. Learning rate and the
    #: schedule of ranks are those of the whole length all the same.
    patience: PositiveInt | None = None

    def evaluations(self, steps: int) -> int:
        """How often held-out rows are judged in a run of so many steps: on its start, after its last step, between."""
        return int(self.eval_on_start) + 1 + ((steps - 1) // self.eval_every if self.eval_every else 0)

    @model_validator(mode="before")
    @classmethod
    def _snapshots_spelled_out(cls, tree: Any) -> Any:
        """When snapshots are taken, said once: evaluations may change when a run goes on, and the average must not."""
        if isinstance(tree, dict) and tree.get("average_last") and tree.get("average_every") is None:
            return {**tree, "average_every": tree.get("eval_every") or tree.get("checkpoint_every")}
        return tree

    @model_validator(mode="after")
    def _average_is_there(self) -> TrainConfig:
        if self.average_last is not None and self.average_every is None:
            raise ValueError(
                "'average_last' averages snapshots, and neither 'average_every' nor 'eval_every' nor "
                "'checkpoint_every' says when they are taken; set 'average_every'"
            )
        if self.average_last is None and self.average_every is not None:
            raise ValueError("'average_every' does nothing without 'average_last'; set that, or remove it")
        if self.average_last is None and self.distill is not None:
            raise ValueError("'distill' learns from the average of 'average_last' snapshots; set it")
        if self.average_last is None and self.keep == "average":
            raise ValueError("'keep: average' needs 'average_last', the number of snapshots to average; set it")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("needs exactly one of 'max_steps' and 'epochs'")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"'batch_size' ({self.batch_size}) must be a multiple of 'micro_batch_size' ({self.micro_batch_size})"
            )
        return self
