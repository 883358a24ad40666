"""Scores from the training steps: what the samples' passes say, and the table that is made of it now and then."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import SamplingConfig, ScoringConfig
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.engine.transfers import to_device
from tsqlora_scale.quality.draws.subset import draws_of
from tsqlora_scale.quality.gradients.sketch import cosines
from tsqlora_scale.quality.online.factor_gradients import FactorGradients
from tsqlora_scale.quality.online.running_scores import RunningScores
from tsqlora_scale.quality.pool import Pool
from tsqlora_scale.quality.scores.equations import Standardisation, term_weights
from tsqlora_scale.quality.scores.pass_scores import PassScores
from tsqlora_scale.quality.scores.score_table import ScoreTable, check_pool, pool_key
from tsqlora_scale.quality.scores.table_draws import set_draws
from tsqlora_scale.tasks.packing import Packing

log = logging.getLogger("tsqlora_scale")

#: What a step adds to the direction of ``alignment`` weighs half as much after 34 steps.
MEMORY = 0.98
#: numbers of a sample that a step gathers: loss, gradient norm, convergence
GATHERED = 3


class OnlineScorer:
    """Listens to the steps (:class:`~.sample_listener.SampleListener`), and rates the pool by what it has heard.

    A visit gives a sample's loss, the norm of its own gradient, its loss reduction to first order, and the cosine of
    its gradient with the direction of the steps before: a decaying sum of the drawn samples' gradients
    (``scoring.mean_gradient``: of unit length or as they are), by sketches. In the very first step there is no
    direction yet, and the cosine is 0. Sketches of single samples are not kept. All numbers are taken as the model
    trains, with dropout, at the parameters of the visit, and averaged over visits.

    Measured on 2,000 film-review sentences, MiniLM, one seed, one visit each in 63 steps, against a full pass at the
    end: the rank correlation of the gradient norm is 0.70 for the second half of the visits and 0.31 for all, that of
    the convergence term 0.66 and 0.15 (the first half). So visits of the warm-up do not count: Pearson's correlation of
    Q is then 0.34 in the place of 0.17 (of a pass after half of the steps: 0.42); with two epochs of 1,500 sentences it
    is 0.64 (0.60). Subtracting moving averages from the
    terms, and other memories of the direction (0.5 to 1), changed less.

    Args:
        scoring, sampling: the config sections.
        pool: the samples.
        theta: the linear modules of a model whose parameters are scored, by name.
        world: the ranks; every one ends a step with the same numbers.
        seed: of the run.
        eta: step size of the loss reduction.
        stratify: whether the pool's strata each keep their share of the draws.
        warmup_steps: steps in which visits do not count, but for the direction.
        without_batch: see :class:`.FactorGradients`.

    Raises:
        UserError: the disk of TMPDIR has no room, on any rank.
    """

    def __init__(
        self,
        scoring: ScoringConfig,
        sampling: SamplingConfig,
        *,
        pool: Pool[Any],
        theta: Callable[[nn.Module], dict[str, nn.Linear]],
        world: World,
        seed: int,
        eta: float,
        stratify: bool = False,
        warmup_steps: int = 0,
        without_batch: Collection[str] = frozenset(),
    ) -> None:
        self.scoring, self.sampling = scoring, sampling
        self.seed, self.eta, self.world = seed, eta, world
        self.pool = pool
        self.pool_key = pool_key(pool)
        self.ratings = 0
        with world.together():
            self.strata = pool.strata() if stratify else None
            self.running = RunningScores(ScoreTable.empty(len(pool)), sketch_dim=scoring.sketch_dim, memory=MEMORY)
        self._standardisation = Standardisation(gate=scoring.gates_convergence)
        self._gradients = FactorGradients(theta, sketch_dim=scoring.sketch_dim, seed=seed, without_batch=without_batch)
        self._warmup_steps = warmup_steps
        self._warms_up = False
        self._size = self._position = 0
        self._unheard = False
        self._warned = False
        self._heard: list[tuple[slice, Tensor]] = []
        self._step_sketch: Tensor | None = None

    @property
    def table(self) -> ScoreTable | None:
        """The table; None before the first rating. Averages in it go on; quality, p and S are of the last rating."""
        return self.running.table if self.ratings else None

    def attach(self, module: nn.Module) -> None:
        """See :class:`~.sample_listener.SampleListener`, as for all that follow.

        Of factors that a rank event has changed, gradients have other coordinates: the direction begins anew.
        """
        self._gradients.attach(module)
        self.running.direction = torch.zeros_like(self.running.direction)

    def start_step(self, step: int, size: int) -> None:
        """Nothing is heard yet."""
        self._warms_up = step < self._warmup_steps
        self._size, self._heard, self._step_sketch, self._unheard = size, [], None, False

    def start_micro_batch(self, size: int, position: int, packing: Packing | None = None) -> None:
        """Listen to the passes that follow."""
        self._position = position
        self._gradients.start(size, packing)

    def end_micro_batch(self, losses: Tensor, factors: Tensor) -> None:
        """Take what was heard."""
        heard = self._gradients.stop()
        if heard is None:
            self._unheard = True
            return
        norms, sketches = heard
        factors = factors.to(norms)
        sketches = (sketches * factors.unsqueeze(1)).double()
        cosine = cosines(sketches, to_device(self.running.direction, sketches.device))
        place = slice(self._position, self._position + len(losses))
        self._heard.append((place, torch.stack([losses.double(), (norms * factors).double(), cosine], 1)))
        usable = torch.where(sketches.isfinite().all(1, keepdim=True), sketches, 0.0)
        if self.scoring.takes_unit_mean:
            usable = torch.nn.functional.normalize(usable)
        total = usable.sum(0)
        self._step_sketch = total if self._step_sketch is None else self._step_sketch + total

    def numbers(self, like: Tensor) -> Tensor:
        """Whether nothing was heard, the samples' numbers, and the sum of their sketches."""
        found = like.new_zeros(self._size, GATHERED)
        for place, values in self._heard:
            found[place] = values.to(found)
        sketch = like.new_zeros(self.scoring.sketch_dim) if self._step_sketch is None else self._step_sketch.to(like)
        return torch.cat([torch.full_like(like[:1], float(self._unheard)), found.flatten(), sketch])

    def take(self, rows: np.ndarray, numbers: Tensor, *, taken: bool) -> None:
        """Count a visit of every sample; where the step was left out, of those that are to blame alone."""
        flag, found, sketch = numbers.split([1, len(rows) * GATHERED, self.scoring.sketch_dim])
        if float(flag) > 0:
            raise UserError(
                "scoring.source='online': no adapted layer of this model is called with the batch's dimension first, "
                "so the samples of a step cannot be told apart; set scoring.source: pass"
            )
        self._warn_of_shared_calls()
        loss, norm, cosine = found.view(len(rows), GATHERED).numpy().T
        values = np.column_stack([loss, norm, self.eta * norm**2, cosine])
        # nor to compare with after a rank event: what that step says of its samples is not counted
        has_none = bool((self.running.direction == 0).all() and (self.running.visits > 0).any())
        if taken:
            self.running.turn(sketch)
        if self._warms_up or has_none:
            return
        if taken:
            self.running.visit(rows, values)
        else:
            bad = ~np.isfinite(loss)
            self.running.visit(rows[bad], values[bad])

    def score(self) -> ScoreTable:
        """Rate every sample by its averages, and take p and, the first time, S. A collective.

        Raises:
            UserError: no sample has finite numbers; the disk of TMPDIR has no room, on any rank.
        """
        table, first = self.running.table, self.ratings == 0
        with self.world.together():
            self._rate(table)
        set_draws(
            table,
            table.quality,
            self.sampling,
            world=self.world,
            seed=self.seed,
            strata=self.strata,
            always=self.pool.query_rows if first else None,
        )
        self.ratings += 1
        return table

    def draws(self) -> tuple[np.ndarray, np.ndarray]:
        """Pool indices of S, and the probabilities (sum 1) by which minibatches are drawn from them."""
        assert self.table is not None
        return draws_of(self.table, self.strata)

    def finish(self) -> None:
        """The run is over: a table that was never rated says what was seen, and that draws were even. A collective."""
        table = self.running.table
        if self.ratings == 0 and (self.running.visits > 0).any():
            with self.world.together():
                self._rate(table)
            table.probability[:] = 1 / len(table)
            table.selected[:] = True
            self.ratings = 1

    def state_dict(self) -> dict[str, Any]:
        """Averages, visits, direction and constants."""
        return {
            "pool": self.pool_key,
            "ratings": self.ratings,
            "standardisation": self._standardisation.state_dict(),
            "running": self.running.state_dict(),
            "table": self.running.table.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: it belongs to another pool.
        """
        check_pool(state["pool"], self.pool_key)
        self.ratings = state["ratings"]
        self._standardisation.load_state_dict(state["standardisation"])
        self.running.table = ScoreTable.from_state_dict(state["table"])
        self.running.load_state_dict(state["running"])

    def _rate(self, table: ScoreTable) -> None:
        """Qualities by the averages, in place (Eq. 1); samples without a visit get the mean one."""
        for block in blocks(len(table)):
            table.scoring_pass[block][self.running.visits[block] != 0] = self.ratings
        scores = PassScores(table, self.ratings)
        finite = scores.finite()
        if not finite.any():
            raise UserError(
                "no sample of the steps has a finite loss and gradient, the model has diverged; "
                "lower train.lr or use model.dtype=fp32"
            )
        scores.warn_of_not_finite(finite, self.pool.sample_ids, says=self.world.is_main)
        scores.fit(self._standardisation, finite)
        scores.rate(self._standardisation, term_weights(self.scoring), finite, before=None)
        scores.give_rest_the_mean(finite)

    def _warn_of_shared_calls(self) -> None:
        if self._gradients.shared is None or self._warned:
            return
        self._warned = True
        if self.world.is_main:
            log.warning(
                "%s is called without the batch's dimension; what such calls add to a sample's gradient cannot be told "
                "apart and is left out of the online scores (not with train.micro_batch_size=1)",
                self._gradients.shared,
            )
