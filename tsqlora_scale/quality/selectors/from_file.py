"""``sampling.selector: file``: scores made elsewhere, or a list of samples, as others have published.

AlpaGasus (Chen et al., 2307.08701) keeps what a large language model gives 4.5 of 5 points; LIMA (Zhou et al.,
2305.11206) is a list of a thousand samples, chosen by hand.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import Config
from tsqlora_scale.quality.pool import Pool
from tsqlora_scale.quality.selectors.ranked import RankedSelector, Rating
from tsqlora_scale.tasks.rows.rated_ids import RatedIds, read_rated_ids


class FileSelector(RankedSelector):
    """What ``sampling.file`` lists, or the best ``sampling.keep_fraction`` by its scores. No model is looked at."""

    def rate(self, module: nn.Module) -> Rating:
        """Read the file."""
        with self.context.world.together():
            found = read_file(self.config, self.pool)
            scores = found.ratings(self.pool.sample_ids, others=self.pool.query_rows)
        return Rating(scores, keep=len(found.scores) if found.is_list else None)


def read_file(config: Config, pool: Pool[Any]) -> RatedIds:
    """What the file says of the pool's samples, checked.

    Raises:
        UserError: naming the file, and what is wrong with it or with the keys beside it.
    """
    value, fraction = config.sampling.file, config.sampling.keep_fraction
    assert value is not None, "needs a file"
    found = read_rated_ids(value)
    if found.is_list and fraction != "auto":
        raise UserError(
            f"sampling.keep_fraction={fraction} cuts by scores, and sampling.file={value!r} has none: it lists what is "
            "kept; leave sampling.keep_fraction at auto, or give the file a column 'score'"
        )
    if found.is_list and config.sampling.stratify is True:
        raise UserError(
            f"sampling.stratify=true gives every label its share of S, and sampling.file={value!r} lists what S is; "
            "leave sampling.stratify at auto, or give the file a column 'score'"
        )
    if not found.is_list and fraction == "auto":
        raise UserError(
            f"sampling.file={value!r} has scores, and sampling.keep_fraction=auto does not say how many of the best "
            "are kept; set it to a number"
        )
    found.ratings(pool.sample_ids, others=pool.query_rows)
    return found
