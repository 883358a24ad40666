"""Which data (paper 2.1): scores, and the draws by them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tsqlora_scale.config.fields import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    StepsOrFraction,
    UnitInterval,
    name_or_extension,
)

#: Names of ``sampling.selector``: those that look at nothing; before the first step at texts, a file, or hidden states
#: of the base; and after a warm-up at outputs or gradients of the model.
BLIND_SELECTORS = ("full", "random", "rs2", "infobatch")
FORWARD_SELECTORS = ("query", "rho", "rds", "dsir", "k_center", "ts_dshapley", "instruction_mining", "file")
#: Those of them that look at no model.
MODEL_FREE_SELECTORS = ("dsir", "file")
OUTPUT_SELECTORS = ("el2n",)
GRADIENT_SELECTORS = ("quality", "less", "grad_norm")
SELECTORS = (*BLIND_SELECTORS, *FORWARD_SELECTORS, *OUTPUT_SELECTORS, *GRADIENT_SELECTORS)
#: Those that choose by ``task.query``, and need it.
QUERY_SELECTORS = ("query", "rho", "rds", "dsir", "less")
#: Those that know by themselves what is worth training on; others need ``sampling.keep_fraction`` to choose anything.
SIZING_SELECTORS = ("full", "random", "quality", "query", "file", "infobatch")
#: Those that rate samples and draw evenly from the best: no probabilities, by which losses could be weighed.
EVEN_SELECTORS = tuple(name for name in SELECTORS if name not in (*BLIND_SELECTORS, "quality", "query"))
#: Those whose best rows may all be of one class, after a short warm-up or by a small query (docs/results.md).
ONE_SIDED_SELECTORS = ("el2n", "grad_norm", "less", "rho")


class ScoringConfig(Section):
    """Per-sample quality scores (paper 2.1, Eq. 1 and 2)."""

    #: Where scores come from. ``pass``: passes over the pool. ``online``: the training steps themselves, averaged over
    #: a sample's visits, without any pass. Then visits within ``warmup_steps`` do not count, draws are even up to the
    #: end of the first epoch over the pool of which half or more comes after them, ``delta_loss`` is first order, and p
    #: is taken anew after every epoch over S, too, unless ``refresh`` is none. What only a pass has (``batch_size``,
    #: ``shard_size``, ``refresh_fraction``) is not looked at.
    source: Literal["pass", "online"] = "pass"
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
    #: ``exact`` takes the loss reduction by a second forward; ``first_order`` is ``eta`` times the squared gradient
    #: norm. ``auto`` is first order where that ranks the samples alike (Spearman above 0.99 on up to 256 of the first
    #: shard), but for ``preset: paper``. Below the rounding of the losses it is first order in any case.
    delta_loss: Literal["auto", "exact", "first_order"] = "auto"
    #: The third term. ``alignment``: how far a sample's gradient goes the way of the pool's; ``loss_trend``: how far
    #: its loss has fallen since the pass before.
    convergence: Literal["alignment", "loss_trend"] = "alignment"
    #: The direction of ``alignment``: the mean of the samples' gradients, or of their gradients scaled to unit length,
    #: in which large ones have no larger say. ``auto`` is unit, but for ``preset: paper``, which is to the letter.
    mean_gradient: Literal["auto", "plain", "unit"] = "auto"
    #: ``linear``: the more a sample's gradient agrees with the others, the better. ``gate``: samples that pull against
    #: the others are worse, the others equal. ``auto`` is gate, but for ``preset: paper`` and for ``loss_trend``.
    convergence_form: Literal["auto", "linear", "gate"] = "auto"
    #: Length of the random projections of gradients by which samples are compared.
    sketch_dim: Annotated[int, Field(ge=16, le=2**20)] = 512
    #: Samples per rank and forward. ``auto`` measures what fits; after an allocation failure it goes on with half.
    batch_size: PositiveInt | Literal["auto"] = "auto"
    #: Samples after which the numbers of a pass are written, so that a killed pass goes on from there.
    shard_size: PositiveInt = 4096
    #: Leave the raw numbers and the sketches of the last pass (4 sketch_dim bytes a sample) in ``score-parts/``.
    keep_sketches: bool = False
    #: Score a uniform subsample and give the rest the mean score. Of passes of gradients and of Eq. 1: selectors that
    #: look at the whole pool by a forward pass, or at its texts alone, do so whatever stands here.
    max_samples: PositiveInt | None = None
    #: Texts are cut to so many tokens where they are scored; none: ``task.max_length``.
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
    #: Of an audit: parts of the pool, each judged by adapters that were trained on the others.
    folds: Annotated[int, Field(ge=2, le=100)] = 4
    #: What an audit judges by: regressions on the frozen base's ``features`` (seconds), cross-fitted ``adapters``
    #: (``folds`` trainings), or both. ``auto`` is features, and adapters where the answers are texts.
    audit: Literal["auto", "features", "adapters", "both"] = "auto"

    @field_validator("convergence", mode="before")
    @classmethod
    def _not_by_the_development_set(cls, value: Any) -> Any:
        """Refuse ``target`` of release 0.1, which its run folders may say."""
        if value == "target":
            raise ValueError(
                "'target' is gone: it chose the training data by the development set, which then also judged the "
                "result and picked the best checkpoint, so its metrics were too good; set 'alignment'"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _online_has_no_pass(cls, tree: Any) -> Any:
        """What a pass has by default, ``source: online`` has not."""
        if isinstance(tree, dict) and tree.get("source") == "online":
            return {"delta_loss": "first_order", **tree}
        return tree

    @model_validator(mode="after")
    def _online_agrees(self) -> ScoringConfig:
        if self.source != "online":
            return self
        wrong = {
            "delta_loss": (self.delta_loss == "exact", "first_order", "a step makes no second forward pass"),
            "convergence": (self.convergence == "loss_trend", "alignment", "it keeps averages, not the last loss"),
            "proxy_model": (self.proxy_model is not None, "null", "the model that is trained scores"),
            "max_samples": (self.max_samples is not None, "null", "it scores what is drawn"),
            "max_length": (self.max_length is not None, "null", "it scores what is trained on"),
            "keep_sketches": (self.keep_sketches, "false", "no sketches are kept"),
        }
        found = [(key, value, reason) for key, (is_wrong, value, reason) in wrong.items() if is_wrong]
        if found:
            reasons = "; ".join(f"'{key}' is {getattr(self, key)!r}, but {reason}" for key, _, reason in found)
            remedy = ", ".join(f"'{key}: {value}'" for key, value, _ in found)
            raise ValueError(f"'source: online' does without a pass over the pool: {reasons}; set {remedy}")
        return self

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

    #: ``full``: the whole pool, evenly; ``random``: a random part of it, evenly; ``quality``: by Eq. 2; ``query``: what
    #: is like the rows of ``task.query``, by the density ratio of wanted to pool; others as papers have them
    #: (docs/selectors.md); or a selector of one's own, ``FILE.py:NAME`` or ``package.module:NAME``. By default it is
    #: ``query`` where there is a query, ``quality`` where a key says how to score (of ``scoring``: all but
    #: ``batch_size``, ``shard_size``, ``keep_sketches``, ``max_length``, ``include_head``, ``folds`` and ``audit``) or
    #: to draw by scores (``tau``, ``keep_fraction``, ``redundancy``, ``similarity``, ``unbiased``, ``use``), else
    #: ``full``; for the plain methods ``full``. (What stands here is that of the section alone.)
    selector: name_or_extension(*SELECTORS) = "quality"  # type: ignore[valid-type]
    #: Temperature of Eq. 2: the lower, the more the best samples are drawn.
    tau: PositiveFloat = 0.7
    #: Size of S as a share of the pool (the query's rows, which S always has, not counted). ``auto``: for
    #: ``query`` what it finds worth training on, for ``file`` what the list names, the whole pool for ``full``,
    #: ``random``, ``quality`` and ``infobatch``; others need a number.
    keep_fraction: UnitInterval | Literal["auto"] = "auto"
    #: ``selector: query``: draw the samples of S by the estimated probability that each is wanted, not evenly. With
    #: ``keep_fraction: 1.0`` nothing is cut off.
    soft: bool = True
    #: Whether a sample may be drawn again before the others of S have been.
    replacement: bool = True
    #: Classification: Eq. 2 within every label, so that each keeps its share of the draws; likewise within every set
    #: of a mixture that asks for shares. ``auto`` is yes, but for ``scoring.preset: paper``, which is to the letter.
    #: Of selectors that rate once, and of ``random``: S has the labels' shares; ``auto`` is yes for ``el2n``,
    #: ``grad_norm``, ``less: mean`` and ``rho``, whose best rows may all be of one label.
    stratify: Literal["auto"] | bool = "auto"
    #: p_i is divided by this power of the number of samples that teach the same as i, itself included. 0: by nothing.
    redundancy: NonNegativeFloat = 0.0
    #: Cosine of two samples' gradients from which on they teach the same.
    similarity: UnitInterval = 0.98
    #: Weigh the losses of drawn samples by 1 / (|S| p_i), divided by the weights of the step's own samples: the
    #: objective is then about the mean loss over S, as with uniform draws, the more so the larger ``train.batch_size``
    #: is, and p decides which gradients estimate it. Without ``replacement`` S is drawn from evenly, and nothing is
    #: weighed.
    unbiased: bool = False
    #: Largest such weight; 1 is that of a sample drawn as often as by uniform draws.
    max_weight: PositiveFloat = 10.0
    #: What probabilities are for. ``draw``: samples of S are drawn by them. ``weight``: they are drawn evenly, and
    #: their losses weigh |S| p_i, at most ``max_weight``.
    use: Literal["draw", "weight"] = "draw"
    #: ``selector: less``: what counts of the cosines to the query's rows: their mean, as published, their maximum, the
    #: maximum within the query's own leading directions, or the query's rows choose in turn.
    less: Literal["mean", "max", "subspace", "round_robin"] = "mean"
    #: ``selector: less``: what the pool's gradients are taken for. ``plain``: themselves; ``adam``: the step that the
    #: optimizer would take by each alone, with the moments that it has then, as published. The query's are plain.
    less_gradients: Literal["plain", "adam"] = "plain"
    #: ``selector: file``: a list of sample ids to train on (``.txt``, an id a line, or a table with a column
    #: ``sample_id`` or ``id``), or scores of the whole pool (a table with a column ``score``, too), the higher the
    #: better; found from the current folder.
    file: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _chooses_something(self) -> SamplingConfig:
        if self.selector == "file" and self.file is None:
            raise ValueError("'selector: file' reads 'file', which is not set; name it")
        if self.selector != "file" and self.file is not None:
            raise ValueError(
                f"'file' is read by 'selector: file' alone, and 'selector' is {self.selector!r}; change one of them"
            )
        if self.keep_fraction == "auto" and self.selector in SELECTORS and self.selector not in SIZING_SELECTORS:
            raise ValueError(
                f"'selector: {self.selector}' ranks the pool and does not say how much of it is good; set "
                "'keep_fraction' to a number"
            )
        if self.keep_fraction != "auto" and self.selector == "infobatch":
            raise ValueError(
                "'selector: infobatch' skips half of what is known in every epoch, and 'keep_fraction' is "
                f"{self.keep_fraction}; leave it at 'auto'"
            )
        if self.use == "weight" and self.unbiased:
            raise ValueError("'use: weight' weighs losses by p, and 'unbiased: true' by 1 / p; turn one of them off")
        return self

    @property
    def draws_evenly(self) -> bool:
        """Whether samples of S are drawn alike, whatever p is: where losses are weighed by it instead, or where nothing
        is to be biased and every sample comes once an epoch, of which the last may be cut short."""
        return self.use == "weight" or (self.unbiased and not self.replacement)

    @property
    def learns_by_weight(self) -> bool:
        """Whether more is learned from a sample the larger p is: not where every one comes once an epoch, nor where
        the losses undo what the draws do."""
        return self.use == "weight" or (self.replacement and not self.unbiased)

    @property
    def weighs_losses(self) -> bool:
        """Whether losses are multiplied by p, or by 1 / p."""
        return self.use == "weight" or (self.unbiased and self.replacement)

    @property
    def most_kept(self) -> float:
        """``keep_fraction``, or all where it is not known beforehand."""
        return 1.0 if self.keep_fraction == "auto" else self.keep_fraction
