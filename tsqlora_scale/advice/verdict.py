"""What to do, and why: a function of what was seen."""

from __future__ import annotations

from dataclasses import dataclass

from tsqlora_scale.advice.paired import Gain
from tsqlora_scale.advice.pilot import ALONE, EVEN, QUERY
from tsqlora_scale.advice.pool_shares import PoolShare

#: Standard errors by which the query stands out of the pool so clearly that a trial need only not speak against it.
CLEAR = 6.0
#: The share of wrong labels of which it is worth telling, if it is at least as large.
TOLD = 0.02


@dataclass(frozen=True)
class Trials:
    """Differences between ways to train: see :mod:`~tsqlora_scale.advice.pilot`."""

    query_less_even: Gain
    alone_less_even: Gain
    query_less_alone: Gain
    even_less_pool: Gain | None = None
    query_less_pool: Gain | None = None
    alone_less_pool: Gain | None = None


@dataclass(frozen=True)
class Verdict:
    """What to do.

    Attributes:
        way: ``query``, ``query alone`` or ``even``.
        reasons: a line each.
        joins_query: whether the query's rows, if there are any, are to be trained on beside what is drawn of the pool.
    """

    way: str
    reasons: tuple[str, ...]
    joins_query: bool = True


def decide(
    *,
    evidence: float | None,
    is_evident: bool = False,
    trials: Trials | None = None,
    wrong: PoolShare | None = None,
    redundant: PoolShare | None = None,
    joins_query: bool = True,
) -> Verdict:
    """The verdict.

    ``query`` where the query stands out of the pool, and the trials show a gain over even draws; or a gain of the
    query's rows alone, whose trial flatters them: on a pool of one topic and another labelling (docs/results.md)
    adapters were better by what was chosen where heads were not. Where it stands out clearly they need only lean to a
    gain. ``query alone`` where the query's rows alone are better than both, beyond doubt. ``even`` otherwise: a choice
    without evidence costs samples.

    Neither where the pool alone is plainly better. Even draws are of the query's rows, too, where these stand out of
    the pool and trials do not speak against it, or where trials show a gain by them. Elsewhere they are as the pool's
    rows are, and stay unseen, for a check.

    Args:
        evidence: standard errors by which the query stands out of the pool; None without a query.
        trials: None where none could be made.
        wrong: the share of wrong labels, where it can be told.
        redundant: the share of copies, where there are any.
        joins_query: whether the run that is asked about trains on the query's rows.
    """
    if evidence is None:
        way, reasons = EVEN, ["there is no task.query to choose by, and no choice without one has beaten even draws"]
    else:
        way, reasons = _by_query(evidence, is_evident, trials)
        over_pool = None
        if trials is not None:
            over_pool = {QUERY: trials.query_less_pool, ALONE: trials.alone_less_pool}.get(way)
        if over_pool is not None and over_pool.is_below:
            way, joins_query = EVEN, False
            reasons.append(f"but in trials the pool alone, evenly, is better still: {_told(over_pool.turned())}")
        elif way == EVEN and joins_query:
            joins_query, reason = _joined(is_evident, None if trials is None else trials.even_less_pool)
            reasons.append(reason)
    if wrong is not None and wrong.low >= TOLD and not wrong.note:
        reasons.append(
            f"about {wrong.share:.0%} of the labels are wrong ({wrong.low:.0%} to {wrong.high:.0%}); dropping, "
            "weighing or correcting suspects beat no well-stopped even run, so have a person look at the audit's list "
            "(launch/score.py --audit)"
        )
    if redundant is not None and redundant.low >= TOLD:
        reasons.append(
            f"about {redundant.share:.0%} of the rows are copies or near-copies of others; the audit's list, which "
            "task.dataset.exclude takes, has the copies, and of classes and numbers its table the near ones, too"
        )
    return Verdict(way, tuple(reasons), joins_query)


def _by_query(evidence: float, is_evident: bool, trials: Trials | None) -> tuple[str, list[str]]:
    stands = f"the query stands out of the pool by {evidence:.1f} standard errors"
    if trials is None:
        if evidence > CLEAR:
            return QUERY, [f"{stands}; no trial was made, as answers are texts (--pilot adapters makes one)"]
        return EVEN, [f"{stands}, which is too little without a trial (--pilot adapters makes one)"]
    gain, alone, over_alone = trials.query_less_even, trials.alone_less_even, trials.query_less_alone
    if alone.is_above and not is_evident:
        return ALONE, [stands, f"in trials the query's rows alone are better than with the pool: {_told(alone)}"]
    if alone.is_above and over_alone.is_below:
        worse = f"what would be chosen of the pool makes the query's rows alone worse: {_told(over_alone)}"
        return ALONE, [stands, f"in trials {worse}; and these are better than even draws: {_told(alone)}"]
    if not is_evident:
        return EVEN, [f"{stands}, which is no evidence: the pool looks like the query, or cannot be told from it"]
    if gain.is_above:
        return QUERY, [stands, f"in trials the choice is better than even draws: {_told(gain)}"]
    if gain.is_below:
        return EVEN, [stands, f"but in trials the choice is worse than even draws: {_told(gain)}"]
    if gain.leans_up and alone.is_above:
        beaten = f"in trials the query's rows alone are better than even draws: {_told(alone)}"
        return QUERY, [stands, beaten, f"and the choice leans to a gain over these, too: {_told(gain)}"]
    if gain.leans_up and evidence > CLEAR:
        return QUERY, [f"{stands}, which is clear", f"and trials lean to the choice: {_told(gain)}"]
    return EVEN, [stands, f"but trials show no gain by the choice over even draws: {_told(gain)}"]


def _joined(is_evident: bool, gain: Gain | None) -> tuple[bool, str]:
    """Whether even draws are of the query's rows, too, and why."""
    tried = "" if gain is None else f": {_told(gain)}"
    if gain is not None and gain.is_above:
        return True, f"in trials the query's rows are a gain beside the pool{tried}"
    if not is_evident:
        return False, f"nothing shows a gain by the query's rows beside the pool{tried}; not trained on, they can judge"
    if gain is not None and gain.is_below:
        return False, f"in trials the query's rows are a loss beside the pool{tried}"
    return True, f"the query's rows, which are of another kind, are trained on beside the pool{tried}"


def _told(found: Gain) -> str:
    nats = f"{found.nats.mean:+.3f} nats a row ({found.nats.low:+.3f} to {found.nats.high:+.3f})"
    if found.points is None:
        return nats
    points = [f"{100 * value:+.1f}" for value in (found.points.mean, found.points.low, found.points.high)]
    return f"{nats}, {points[0]} points ({points[1]} to {points[2]})"
