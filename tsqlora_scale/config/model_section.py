"""The frozen base, and the adapter on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

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
    """

    scored: bool
    resized: bool
    triplets: bool = False


#: DoRA's magnitudes are no linear modules, and follow the factors' norms; rsLoRA's scaling follows the rank.
ADAPTER_TRAITS = {
    "lora": AdapterTraits(scored=True, resized=True),
    "rslora": AdapterTraits(scored=True, resized=False),
    "dora": AdapterTraits(scored=False, resized=False),
    "svd": AdapterTraits(scored=True, resized=True, triplets=True),
}


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
    method: Literal["tsqlora", "lora", "rslora", "dora", "adalora", "elalora"] | None = "tsqlora"
    #: PEFT's own layers; ``svd`` is AdaLoRA's form of them, B diag(E) A, of which whole triplets come and go, and whose
    #: file is a plain LoRA adapter's.
    type: Literal["lora", "rslora", "dora", "svd"] = "lora"
    #: Rank of every adapted layer at the start; the budget that moves is r times their number. AdaLoRA starts with 1.5
    #: times the ranks that it ends with: 12 for 8.
    r: PositiveInt = 8
    #: The scaling s = alpha / r stays constant when ranks change: rescaling harms (docs/method.md).
    alpha: PositiveFloat = 16.0
    #: γ of AdaLoRA's penalty γ mean(‖A Aᵀ - I‖, ‖Bᵀ B - I‖) over all factors; its gradient is added to that of the
    #: loss, the losses that a run reports are without it. 0.1 with ``method: adalora``, unless set.
    orthogonality: NonNegativeFloat = 0.0
    #: Dropout of the factors' input while they train; scores are taken without.
    dropout: Below1 = 0.0
    #: Module-name suffixes, or ``auto``: every linear layer of attention and feed-forward blocks that text gives a
    #: gradient to.
    target_modules: list[str] | Literal["auto"] = "auto"
    #: Adapt these blocks alone: their numbers, from 0 at the bottom and in an encoder-decoder through the encoder and
    #: then the decoder, or ``top:K``, the K uppermost; none: all of them.
    layers: Layers | None = None
    #: Train the head of a classification or regression model whole, be it new or the checkpoint's; false keeps the
    #: checkpoint's as it is.
    train_head: bool = True
    #: A trained adapter that the run starts from, with its ranks and values: its folder, a run folder or a checkpoint.
    #: A head of another task, or with other labels, is newly drawn.
    init_from: Annotated[str, Field(min_length=1)] | None = None
