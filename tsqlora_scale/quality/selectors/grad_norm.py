"""``sampling.selector: grad_norm``: the samples with the largest gradients, the first term of Eq. 1 alone.

Paul, Ganguli and Dziugaite, *Deep Learning on a Data Diet*, 2107.07075 (GraNd), there as a mean over ten
initialisations; Katharopoulos and Fleuret, 1803.00942, draw by it. Mislabelled samples have large gradients.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from tsqlora_scale.quality.selectors.gradient_passes import gradient_pass
from tsqlora_scale.quality.selectors.ranked import RankedSelector, Rating


class GradNormSelector(RankedSelector):
    """Keeps the largest norms after the warm-up; samples whose gradient is not finite come last."""

    def rate(self, module: nn.Module) -> Rating:
        """One pass of gradients, without sketches."""
        scorer = gradient_pass(self.context, module, self.pool, name="pool", sketches=False)
        assert scorer.table is not None
        scorer.discard_parts()
        norms = scorer.table.grad_norm
        finite = np.isfinite(norms)
        return Rating(np.where(finite, norms, norms[finite].min()))
