"""What selectors have in common that look at samples by forward passes alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.quality.features.forward_pass import ForwardPass, Look
from tsqlora_scale.quality.pool import Pool
from tsqlora_scale.quality.query.looks import FeatureLook, Shape
from tsqlora_scale.quality.selectors.ranked import RankedSelector


class ForwardSelector(RankedSelector):
    """Rates the pool by what a forward pass shows of every sample."""

    def seen(
        self, module: nn.Module, look: Look, *, name: str, frozen: bool = True, with_query: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """What ``look`` sees of the pool (N, width) and of the query (n, width), float32. A collective.

        Args:
            name: says what ``look`` sees.
            frozen: look through the base alone, without its adapters; else nothing is kept of a killed pass.
            with_query: look at the query, too.

        Returns:
            The second is empty without a query.

        Raises:
            UserError: what is seen is not finite, on every rank.
        """
        config = self.config
        passes = self._passes(module, frozen=frozen)

        def of_all(pool: Pool[Any]) -> np.ndarray:
            whole = f"{name} {config.model.weights_name} {config.run.seed}"
            return passes.run(pool, np.arange(len(pool)), look, name=whole)

        query = self.pool.query if with_query else None
        of_query = None if query is None else of_all(query)
        of_pool = of_all(self.pool)
        passes.forget()
        of_query = of_pool[:0] if of_query is None else of_query
        with self.context.world.together():
            for numbers in (of_pool, of_query):
                if not all(np.isfinite(numbers[block]).all() for block in blocks(len(numbers), 2**14)):
                    raise UserError(
                        f"sampling.selector={config.sampling.selector!r}: what the model makes of a sample is not "
                        "finite; its weights are damaged, or it computes in too coarse a type: use model.dtype=fp32"
                    )
        return of_pool, of_query

    def features(self, module: nn.Module) -> tuple[np.ndarray, np.ndarray, Shape]:
        """Features of some layers, and targets or losses, of pool and query; and their shape. A collective."""
        look = FeatureLook(self.pool, seed=self.config.run.seed)
        of_pool, of_query = self.seen(module, look, name="features")
        shape = look.agreed_shape(module, self.context.world, max_length=self.config.scoring.max_length)
        return of_pool, of_query, shape

    def _passes(self, module: nn.Module, *, frozen: bool) -> ForwardPass:
        scoring, context = self.config.scoring, self.context
        return ForwardPass(
            module,
            context.world,
            batch_size=scoring.batch_size,
            shard_size=scoring.shard_size,
            max_length=scoring.max_length,
            frozen=frozen,
            progress=context.progress,
            folder=context.parts_folder if frozen else None,
        )
