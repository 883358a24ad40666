"""Prompt tuning (2104.08691): trained vectors before the embeddings of every text.

To the base the vectors are tokens: a row gets numbers for them that no token has, and what the base's table of
embeddings gives at these is exchanged. So whatever a model reads off its tokens, their positions, their masks, where a
text ends, is as for a longer text, in generation, too; and what goes back to the caller has the caller's positions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.config.schema import AdapterConfig
from tsqlora_scale.engine.sharded import read_parameter, whole_shape
from tsqlora_scale.model.adapters.own_type import OwnAdapter
from tsqlora_scale.model.adapters.placed_model import PlacedModel
from tsqlora_scale.model.adapters.placement import Placement
from tsqlora_scale.model.adapters.prompted_generation import callers_tokens
from tsqlora_scale.tasks.objectives.model_inputs import pools_by_pads

#: The name that the vectors have in the base.
SLOT = "prompt_vectors"
#: The number of the first vector in a row of tokens; the next ones have the next lower numbers. Not -1 or -100, which
#: mean something to models.
FIRST = -1000


class PromptVectors(nn.Module):
    """P vectors (P, d), by the numbers that they have in rows of tokens."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self._disable_adapters = False  # as PEFT's layers have it, for looks at the base alone
        self.vectors = nn.Parameter(start.clone())
        #: Tokens (B, T) as the table of embeddings was asked for them, until it answers.
        self.asked: Tensor | None = None
        #: The width P + T of the rows that are inside the base, where logits are to be the caller's alone.
        self.inside: tuple[Tensor, int] | None = None

    def forward(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """What the table has given for tokens (B, T), (B, T, d), with the vectors at their places."""
        numbers = FIRST - torch.arange(len(self.vectors), device=ids.device)
        # a product, whose gradient adds up in one order on every device
        own = (ids.unsqueeze(-1) == numbers).to(self.vectors.dtype) @ self.vectors
        return torch.where((ids < 0).unsqueeze(-1), own.to(embedded.dtype), embedded)


def inserted(rows: Tensor, lead: Tensor, between: Tensor) -> Tensor:
    """Rows (B, T) with ``between``, (P,), after the first ``lead``, (B, 1), of each: (B, P + T)."""
    width, count = rows.shape[1], len(between)
    place = torch.arange(count + width, device=rows.device).expand(len(rows), -1)
    old = torch.where(place < lead, place, place - count).clamp(min=0)
    new = between.to(rows.dtype)[(place - lead).clamp(0, count - 1)]
    return torch.where((place >= lead) & (place < lead + count), new, rows.gather(1, old))


def taken_out(rows: Tensor, lead: Tensor, count: int) -> Tensor:
    """What :func:`inserted` has put ``count`` into, without: of (B, P + T, ...) the (B, T, ...)."""
    kept = torch.arange(rows.shape[1] - count, device=rows.device).view(1, -1, *(1,) * (rows.dim() - 2))
    at_start = kept < lead.view(-1, *(1,) * (rows.dim() - 1))
    return torch.where(at_start, rows[:, : rows.shape[1] - count], rows[:, count:])


class PromptedModel(PlacedModel):
    """A base with prompt vectors: they come before a row's tokens, behind its padding on the left, and, in an encoder,
    behind the first token, which classifiers read.
    """

    def __init__(self, base: nn.Module, whole_modules: Iterable[str] = ()) -> None:
        super().__init__(base, whole_modules)
        self._own_lead = int(keeps_first(base))

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """The base's, of the rows with the vectors; logits and hidden states are those of the caller's tokens."""
        prompt, base = self.prompt, self.get_base_model()
        inputs = kwargs | {"input_ids": input_ids}
        if prompt._disable_adapters:
            return base(**inputs)
        lead = self._lead(inputs)
        inputs = self._longer(inputs, lead)
        two_sides = base.config.is_encoder_decoder
        prompt.inside = None if two_sides else (lead, inputs["input_ids"].shape[1])
        try:
            outputs = base(**inputs)
            for name in ("encoder_hidden_states", "encoder_last_hidden_state") if two_sides else ("hidden_states",):
                states = outputs.get(name)
                if states is not None:
                    cut = partial(taken_out, lead=lead, count=self._count)
                    outputs[name] = tuple(map(cut, states)) if isinstance(states, tuple) else cut(states)
            logits = outputs.get("logits")
            if logits is not None:
                outputs["logits"] = _callers_own(prompt, logits)
        finally:
            prompt.inside = None
        return outputs

    def generate(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """The base's, after the vectors and the tokens; the caller's tokens come first in what is given, as ever.

        Lengths are of the caller's tokens, and processors and criteria see no others.
        """
        base = self.get_base_model()
        if self.prompt._disable_adapters:
            return base.generate(input_ids=input_ids, **kwargs)
        inputs = kwargs | {"input_ids": input_ids}
        lead = self._lead(inputs)
        longer = self._longer(inputs, lead)
        count = 0 if base.config.is_encoder_decoder else self._count

        def without(rows: Tensor) -> Tensor:  # those of a text stand together, however many
            return taken_out(rows, lead.to(rows.device).repeat_interleave(len(rows) // len(lead), 0), count)

        with callers_tokens(base, input_ids, without, count):
            found = base.generate(**longer)
        if base.config.is_encoder_decoder:
            return found
        tokens = found if isinstance(found, Tensor) else found.sequences
        own = input_ids.repeat_interleave(len(tokens) // len(input_ids), 0)
        tokens = torch.cat([own, tokens[:, longer["input_ids"].shape[1] :]], dim=1)
        if isinstance(found, Tensor):
            return tokens
        found.sequences = tokens
        return found

    @property
    def prompt(self) -> PromptVectors:
        """The vectors."""
        found = self.get_base_model().get_submodule(SLOT)
        assert isinstance(found, PromptVectors)
        return found

    @property
    def _count(self) -> int:
        return int(whole_shape(self.prompt.vectors)[0])

    def _lead(self, inputs: dict[str, Any]) -> Tensor:
        """How many tokens of every row, (B, 1), come before the vectors."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        pads = torch.zeros_like(ids[:, :1]) if mask is None else (mask.cumsum(1) == 0).sum(1, keepdim=True)
        return (pads + self._own_lead).clamp(max=ids.shape[1])

    def _longer(self, inputs: dict[str, Any], lead: Tensor) -> dict[str, Any]:
        """The inputs with the vectors' numbers among the tokens, and what else is told of every token."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        numbers = FIRST - torch.arange(self._count, device=ids.device)
        longer = dict(inputs, input_ids=inserted(ids, lead, numbers))
        if mask is not None:
            longer["attention_mask"] = inserted(mask, lead, torch.ones_like(numbers))
        if inputs.get("token_type_ids") is not None:
            longer["token_type_ids"] = inserted(inputs["token_type_ids"], lead, torch.zeros_like(numbers))
        if inputs.get("position_ids") is not None:  # which a task tells where rows are padded on the left
            assert mask is not None, "rows of which positions are told have a mask"
            longer["position_ids"] = (longer["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return longer


def keeps_first(base: Any) -> bool:
    """Whether a row's first token, which stands for all of it (BERT's ``[CLS]``), stays the first: in encoders, except
    those that read the last.
    """
    name, config = type(base).__name__, base.config
    if config.is_encoder_decoder:
        return False
    classifies = "ForSequenceClassification" in name and not pools_by_pads(type(base))
    return "ForMaskedLM" in name or (classifies and getattr(config, "summary_type", None) != "last")


def tables(base: Any) -> list[nn.Embedding]:
    """The embeddings that the base's tokens go through: one, or one of encoder and decoder each.

    Raises:
        UserError: the model has none.
    """
    sides = [base]
    if base.config.is_encoder_decoder:
        sides += [base.get_encoder(), base.get_decoder()]
    found: dict[int, Any] = {}
    for side in sides:
        try:
            table = side.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            table = None
        found |= {} if table is None else {id(table): table}
    if not found or not all(isinstance(table, nn.Embedding) for table in found.values()):
        raise UserError(
            f"adapter.type='prompt': a {base.config.model_type} model has no table of its tokens' embeddings, before "
            "whose rows vectors could stand; choose adapter.type=lora"
        )
    return list(found.values())


def embedded(table: Any, ids: Tensor) -> Tensor:
    """What a table gives for tokens (P,), (P, d) float32. With ZeRO-3 a collective."""
    rows = read_parameter(table.weight)[ids.to(table.weight.device)].float()
    scale = getattr(table, "embed_scale", None)
    return rows if scale is None else rows * torch.as_tensor(scale, dtype=rows.dtype, device=rows.device)


def drawn_tokens(table: nn.Embedding, count: int, generator: torch.Generator) -> Tensor:
    """Tokens (P,) of the vocabulary, each once while there are enough; not the padding."""
    size = table.num_embeddings
    order = torch.cat([torch.randperm(size, generator=generator) for _ in range(count // max(size - 1, 1) + 1)])
    return order[order != (-1 if table.padding_idx is None else table.padding_idx)][:count]


def _ask(prompt: PromptVectors, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    prompt.asked = args[0]
    return (args[0].clamp(min=0), *args[1:])


def _answer(prompt: PromptVectors, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    ids, prompt.asked = prompt.asked, None
    assert ids is not None, "the table is asked by place"
    found: Tensor = prompt(ids, output)
    return found


def _callers_own(prompt: PromptVectors, states: Tensor) -> Tensor:
    """States or logits of the caller's tokens, of those of all; any other tensor as it is.

    Logits of the needed places alone, (1, n, V), may be as many as a row has places, P + T: of more rows than one they
    are told by their one row, of one row they are at most T.
    """
    if prompt.inside is None:
        return states
    lead, width = prompt.inside
    if states.dim() != 3 or states.shape[:2] != (len(lead), width):
        return states
    return taken_out(states, lead, int(whole_shape(prompt.vectors)[0]))


def _before_logits(prompt: PromptVectors, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return (_callers_own(prompt, args[0]), *args[1:]) if args and isinstance(args[0], Tensor) else None


class PromptTuning(OwnAdapter):
    """``adapter.type: prompt``."""

    name = "prompt"
    width_key = "prompt_tokens"

    def place(self, base: Any, r: int, generator: torch.Generator, ids: Collection[int] = ()) -> None:
        """See :class:`~.own_type.OwnAdapter`; vectors start as embeddings of tokens, ``ids`` or drawn ones."""
        places = tables(base)
        table = places[0]
        drawn = drawn_tokens(table, r, generator)
        start = (list(ids) * (r // len(ids) + 1))[:r] if ids else drawn.tolist()
        prompt = PromptVectors(embedded(table, torch.tensor(start, dtype=torch.int64)))
        base.add_module(SLOT, prompt)
        for each in places:
            each.register_forward_pre_hook(partial(_ask, prompt))
            each.register_forward_hook(partial(_answer, prompt))
        head = None if base.config.is_encoder_decoder else base.get_output_embeddings()
        if isinstance(head, nn.Module):  # logits are made of the caller's tokens alone
            head.register_forward_pre_hook(partial(_before_logits, prompt))

    def put(self, base: Any, placement: Placement) -> None:
        """See :class:`~.own_type.OwnAdapter`."""
        self.place(base, placement.adapter.prompt_tokens, placement.generator, placement.prompt_ids)

    def wrapped(self, base: nn.Module, whole_modules: Iterable[str]) -> PromptedModel:
        """See :class:`~.own_type.OwnAdapter`."""
        return PromptedModel(base, whole_modules)

    def chosen(self, model: nn.Module, unreached: Collection[str]) -> set[str]:
        """The vectors."""
        return {f"{SLOT}.vectors"}

    def check(self, model: Any) -> None:
        """See :func:`tables`."""
        tables(model)

    def width(self, base: nn.Module) -> int:
        """How many vectors there are."""
        prompt = base.get_submodule(SLOT)
        assert isinstance(prompt, PromptVectors)
        return int(whole_shape(prompt.vectors)[0])

    def tokens_ahead(self, adapter: AdapterConfig) -> int:
        """All of them have positions."""
        return adapter.prompt_tokens
