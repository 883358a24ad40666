"""The frozen base, and the adapter on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from tsqlora_scale.config.fields import LARGEST, Below1, NonNegativeFloat, PositiveFloat, PositiveInt, Section


class ModelConfig(Section):
    """The frozen base model."""

    #: A hub name, a folder, or ``package:NAME/sub/folder`` (a folder inside an installed package).
    name_or_path: Annotated[str, Field(min_length=1)]
    #: Branch, tag or commit of a hub model; none is its main branch.
    revision: str | None = None
    #: Storage and compute type of the base; the LoRA factors are float32 in any case.
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    #: ``nf4`` packs the base into 4 bits as it loads; a base whose files are 4-bit by bitsandbytes already needs it,
    #: and keeps its own type (nf4 or fp4).
    quantization: Literal["none", "nf4"] = "none"
    #: Storage type of packed 4-bit weights; a float type lets sharding engines treat them as ordinary tensors.
    quant_storage: Literal["uint8", "bf16", "fp32"] = "uint8"
    #: On a GPU, let float32 products round their factors to TF32 (10 bits of mantissa): several times as fast. The same
    #: to no more than three digits; fp32 alone has such products.
    tf32: bool = False
    #: How attention is computed: ``auto`` is what Transformers takes; ``flash_attention_2`` and ``_3`` need
    #: their packages, a GPU, and bf16 or fp16.
    attention: Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] = "auto"
    #: Compute activations again in the backward pass, in scoring too: less memory for more time.
    gradient_checkpointing: bool = False
    #: One value for every dropout of the base; none leaves the model's own.
    dropout: Below1 | None = None
    #: Run code that comes with the model; read it first.
    trust_remote_code: bool = False

    @property
    def weights_name(self) -> str:
        """Says which weights the base computes with: numbers that were kept are taken up under the same name alone."""
        return f"{self.name_or_path} {self.dtype} {self.quantization}"


@dataclass(frozen=True)
class AdapterTraits:
    """What a run may do with an adapter type.

    Attributes:
        scored: its trained parameters are linear modules, whose per-sample gradients are exact.
        resized: its ranks may change while it trains.
        triplets: between its factors stands a diagonal: components stay whole or go, and are scored by the factors
            alone.
        layers: it sits in the linear layers that ``adapter.target_modules`` names.
        wide: ``adapter.r`` means something to it: ranks, or the width of its bottlenecks.
        packed: its base may be 4-bit.
        fsdp: it trains under FSDP2.
        own: PEFT has none of the kind, and does not open what is saved.
        prompts: ``adapter.prompt_tokens`` means something to it: what it trains stands before every text.
        unmerged: why a model without it cannot compute the same; empty where a merge is exact.
    """

    scored: bool
    resized: bool
    triplets: bool = False
    layers: bool = True
    wide: bool = True
    packed: bool = True
    fsdp: bool = True
    own: bool = False
    prompts: bool = False
    unmerged: str = ""


#: DoRA's magnitudes are no linear modules, and follow the factors' norms; rsLoRA's scaling follows the rank. LoRATRF's
#: samples are scored by its LoRA factors. Biases, and all weights, are more than linear modules.
ADAPTER_TRAITS = {
    "lora": AdapterTraits(scored=True, resized=True),
    "rslora": AdapterTraits(scored=True, resized=False),
    "dora": AdapterTraits(scored=False, resized=False, fsdp=False),
    "svd": AdapterTraits(scored=True, resized=True, triplets=True),
    "loratrf": AdapterTraits(
        scored=True, resized=True, fsdp=False, own=True,
        unmerged="its filter weighs every token by a cosine, and no weight of the base does that",
    ),
    "bitfit": AdapterTraits(scored=False, resized=False, layers=False, wide=False, packed=False, fsdp=False, own=True),
    "houlsby": AdapterTraits(
        scored=True, resized=False, layers=False, fsdp=False, own=True,
        unmerged="its bottlenecks have a nonlinearity inside, and no weight of the base does that",
    ),
    "pfeiffer": AdapterTraits(
        scored=True, resized=False, layers=False, fsdp=False, own=True,
        unmerged="its bottlenecks have a nonlinearity inside, and no weight of the base does that",
    ),
    "prompt": AdapterTraits(
        scored=False, resized=False, layers=False, wide=False, fsdp=False, own=True, prompts=True,
        unmerged="its vectors stand before every text, and no weight of the base does that",
    ),
    "prefix": AdapterTraits(
        scored=False, resized=False, layers=False, wide=False, fsdp=False, own=True, prompts=True,
        unmerged="its keys and values stand before every text's, and no weight of the base does that",
    ),
    "full": AdapterTraits(scored=False, resized=False, layers=False, wide=False, packed=False, fsdp=False, own=True),
}  # fmt: skip


def _without_repeats(layers: list[int]) -> list[int]:
    if len(set(layers)) < len(layers):
        raise ValueError(f"{layers} names a block twice; name each once")
    return layers


#: Blocks of a model: numbers, or ``top:K``.
Layers = (
    Annotated[list[Annotated[int, Field(ge=0, le=LARGEST)]], Field(min_length=1), AfterValidator(_without_repeats)]
    | Annotated[str, Field(pattern=r"^top:[1-9][0-9]{0,5}$")]
)


class AdapterConfig(Section):
    """What is trained: the adapter's type, its ranks at the start, and its layers."""

    #: A name for three keys that are independent of one another: this section's ``type``, ``sampling.selector`` and
    #: ``allocation.policy``. Those that are not set take the method's values; none sets nothing.
    #: ``adalora`` and ``elalora`` set smoothing and bounds as well, as their papers have them (docs/method.md).
    method: (
        Literal[
            "tsqlora",
            "lora",
            "rslora",
            "dora",
            "adalora",
            "elalora",
            "loratrf",
            "bitfit",
            "houlsby",
            "pfeiffer",
            "prompt",
            "prefix",
            "full",
        ]
        | None
    ) = "tsqlora"
    #: ``lora``, ``rslora``, ``dora``: PEFT's own layers; ``svd``: AdaLoRA's form of them, B diag(E) A, of which whole
    #: triplets come and go, and whose file is a plain LoRA adapter's; ``loratrf``: LoRA and a filter of every block's
    #: output; ``bitfit``: the biases that the base has; ``houlsby``, ``pfeiffer``: bottlenecks after attention and
    #: feed-forward, or the latter alone; ``prompt``: vectors before the embeddings of every text; ``prefix``: keys and
    #: values before those of every attention; ``full``: all parameters (docs/adapters.md).
    type: Literal[
        "lora", "rslora", "dora", "svd", "loratrf", "bitfit", "houlsby", "pfeiffer", "prompt", "prefix", "full"
    ] = "lora"
    #: Rank of every adapted layer at the start; the budget that moves is r times their number. AdaLoRA starts with 1.5
    #: times the ranks that it ends with: 12 for 8. Of ``houlsby`` and ``pfeiffer`` the width of a bottleneck.
    r: PositiveInt = 8
    #: How LoRA's factors start: ``default``, A drawn uniformly and B zero; ``gaussian``, A drawn normally; ``pissa``,
    #: ``olora``: both a part of the weight, which loses it; ``eva``: A the leading directions of the layer's inputs
    #: (docs/adapters.md).
    init: Literal["default", "gaussian", "pissa", "olora", "eva"] = "default"
    #: Samples of the pool that ``init: eva`` looks at.
    init_samples: PositiveInt = 128
    #: Rank of ``loratrf``'s matrix T; none: r.
    filter_rank: PositiveInt | None = None
    #: Vectors of ``prompt``, and keys and values of ``prefix`` in every attention. Those of ``prompt`` take positions:
    #: with ``task.max_length`` no more than the model has.
    prompt_tokens: PositiveInt = 20
    #: Text whose tokens' embeddings the vectors of ``prompt`` start as, again and again until there are enough; none:
    #: drawn tokens.
    prompt_text: Annotated[str, Field(min_length=1)] | None = None
    #: The scaling s = alpha / r stays constant when ranks change: rescaling harms (docs/method.md).
    alpha: PositiveFloat = 16.0
    #: γ of AdaLoRA's penalty γ mean(‖A Aᵀ - I‖, ‖Bᵀ B - I‖) over all factors; its gradient is added to that of the
    #: loss, the losses that a run reports are without it. 0.1 with ``method: adalora``, unless set.
    orthogonality: NonNegativeFloat = 0.0
    #: Dropout of the factors' input while they train; scores are taken without.
    dropout: Below1 = 0.0
    #: Module-name suffixes, or ``auto``: every linear layer of attention and feed-forward blocks that text gives a
    #: gradient to. ``loratrf``: that paper's choice, of encoders and encoder-decoders the value projections and the
    #: feed-forward blocks' two matrices, of decoders with a language head the attention's output in the place of the
    #: values.
    target_modules: list[str] | Literal["auto", "loratrf"] = "auto"
    #: Adapt (``bitfit``, ``full``: train) these blocks alone: their numbers, from 0 at the bottom and in an
    #: encoder-decoder through the encoder and then the decoder, or ``top:K``, the K uppermost; none: all of them.
    layers: Layers | None = None
    #: Train the head of a classification or regression model whole, be it new or the checkpoint's; false keeps the
    #: checkpoint's as it is.
    train_head: bool = True
    #: A trained adapter that the run starts from, with its ranks and values: its folder, a run folder or a checkpoint.
    #: A head of another task, or with other labels, is newly drawn.
    init_from: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _keys_mean_something(self) -> AdapterConfig:
        traits = ADAPTER_TRAITS[self.type]
        kind = f"'adapter.type: {self.type}'"
        if not traits.layers and self.target_modules != "auto":
            raise ValueError(f"{kind} chooses no linear layers; remove 'target_modules'")
        if traits.prompts and self.layers is not None:
            raise ValueError(f"{kind} sits in all blocks; remove 'layers'")
        if not traits.layers and self.dropout:
            raise ValueError(f"{kind} has no factors whose input 'dropout' ({self.dropout:g}) could drop; remove it")
        if self.init != "default" and self.type not in ("lora", "rslora", "loratrf"):
            raise ValueError(f"'init: {self.init}' is of LoRA's two factors, and not for {kind}; remove it")
        if self.init != "default" and self.init_from is not None:
            raise ValueError(
                f"'init: {self.init}' says how factors start, and 'init_from' gives them; remove one of them"
            )
        if self.filter_rank is not None and self.type != "loratrf":
            raise ValueError(f"'filter_rank' is of 'adapter.type: loratrf', not of {kind}; remove it")
        if self.prompt_tokens != AdapterConfig.model_fields["prompt_tokens"].default and not traits.prompts:
            raise ValueError(f"'prompt_tokens' is of 'adapter.type: prompt' and 'prefix', not of {kind}; remove it")
        if self.prompt_text is not None and self.type != "prompt":
            raise ValueError(f"'prompt_text' is of 'adapter.type: prompt', not of {kind}; remove it")
        if self.prompt_text is not None and self.init_from is not None:
            raise ValueError("'prompt_text' says what vectors start as, and 'init_from' gives them; remove one of them")
        return self

    @property
    def starts_in_base(self) -> bool:
        """Whether factors start as a part of the base's weights, which lose it."""
        return self.init in ("pissa", "olora")
