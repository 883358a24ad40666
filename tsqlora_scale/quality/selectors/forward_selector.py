"""What selectors have in common that look at samples by forward passes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from torch import nn

from tsqlora_scale.common.disk_arrays import blocks
from tsqlora_scale.common.errors import UserError
from tsqlora_scale.engine.collectives import World
from tsqlora_scale.quality.features.forward_pass import ForwardPass, Look
from tsqlora_scale.quality.pool import Pool
from tsqlora_scale.quality.query.looks import FeatureLook, Shape
from tsqlora_scale.quality.selectors.ranked import RankedSelector

T = TypeVar("T")


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
        base = f"{config.model.name_or_path} {config.model.dtype} {config.model.quantization}"
        passes = self._passes(module, frozen=frozen)

        def of_all(pool: Pool[Any]) -> np.ndarray:
            return passes.run(pool, np.arange(len(pool)), look, name=f"{name} {base} {config.run.seed}")

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
        shapes = [found for found in self.context.world.gather_objects(look.shape) if found is not None]
        if not shapes:  # all of it is kept of a killed pass, and nothing has been looked at in this one
            self._passes(module, frozen=True).run(self.pool, np.arange(1), look, name="shape")
            shapes = [found for found in self.context.world.gather_objects(look.shape) if found is not None]
        return of_pool, of_query, shapes[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """See :func:`on_main`."""
        return on_main(self.context.world, work)

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


def on_main(world: World, work: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank: sums may round otherwise with other numbers of threads. A collective."""
    found: Any = None
    with world.together():
        if world.is_main:
            found = work()
    answer: T = world.broadcast(found)
    return answer
