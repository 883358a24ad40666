"""Generation behind vectors that the caller has not given: what counts or reads tokens has the caller's alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

#: Of rows with the vectors, at any time of a generation and once for every beam, the rows without.
Without = Callable[[Any], Any]


class CallersProcessors(LogitsProcessorList):
    """Processors of scores (rows, V) that get the caller's tokens and those that were generated."""

    without: Without

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """See :class:`~transformers.LogitsProcessorList`."""
        return super().__call__(self.without(input_ids), scores, **kwargs)


class CallersCriteria(StoppingCriteriaList):
    """Criteria of an end that get the same."""

    without: Without
    ahead: int

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """See :class:`~transformers.StoppingCriteriaList`."""
        return super().__call__(self.without(input_ids), scores, **kwargs)

    @property
    def max_length(self) -> int | None:
        """With the vectors, as generation asks that counts them."""
        found = super().max_length
        return None if found is None else found + self.ahead


@contextmanager
def callers_tokens(base: Any, input_ids: Tensor, without: Without, count: int) -> Iterator[None]:
    """Inside, ``base.generate`` takes lengths for those of the caller's tokens, its own and the caller's processors
    and criteria see these alone, and those that read the source see ``input_ids``.

    Args:
        without: of rows with the vectors those without.
        count: vectors in a row that is generated on: 0 where they are in the encoder's.
    """

    def lengths(*, generation_config: Any, has_default_max_length: bool, **rest: Any) -> Any:
        if generation_config.max_new_tokens is None and not has_default_max_length:
            generation_config.max_length += count
        if generation_config.min_new_tokens is None and generation_config.min_length:
            generation_config.min_length += count
        return type(base)._prepare_generated_length(
            base, generation_config, has_default_max_length=has_default_max_length, **rest
        )

    def processors(*, generation_config: Any, input_ids_seq_length: int, **rest: Any) -> CallersProcessors:
        rest["encoder_input_ids"] = input_ids
        found = CallersProcessors(
            type(base)._get_logits_processor(
                base, _shorter(generation_config, count), input_ids_seq_length - count, **rest
            )
        )
        found.without = without
        return found

    def criteria(*, generation_config: Any, **rest: Any) -> CallersCriteria:
        found = CallersCriteria(type(base)._get_stopping_criteria(base, _shorter(generation_config, count), **rest))
        found.without, found.ahead = without, count
        return found

    own: dict[str, Callable[..., Any]] = {
        "_prepare_generated_length": lengths,
        "_get_logits_processor": processors,
        "_get_stopping_criteria": criteria,
    }
    try:
        for name, method in own.items():
            setattr(base, name, method)
        yield
    finally:
        for name in own:
            vars(base).pop(name, None)


def _shorter(generation_config: Any, count: int) -> Any:
    """A generation's config with lengths of the caller's tokens."""
    own = copy.copy(generation_config)
    for name in ("max_length", "min_length"):
        if getattr(own, name):
            setattr(own, name, max(getattr(own, name) - count, 0))
    return own
