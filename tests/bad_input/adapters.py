"""Types of adapters with keys, models and launchers that they have no use for."""

from __future__ import annotations

from typing import Any

from tests.bad_input.launchers import FSDP
from tests.bad_input.place import Case, Place, settings
from tests.tiny import tiny_model


def _on(kind: str, name: str, *words: str, **adapter: Any) -> Case:
    """An adapter on a tiny model of another kind."""

    def make(place: Place) -> None:
        place.tree["model"]["name_or_path"] = str(tiny_model(kind, place.models))
        place.set(adapter=adapter)

    return Case(name, words, make, "train")


def _today(name: str, *words: str, **sections: dict[str, Any]) -> Case:
    """Keys of the config changed, of which none is of release 0.1."""

    def make(place: Place) -> None:
        del place.tree["sensitivity"]["enabled"]
        place.set(**sections)

    return Case(name, words, make, "train")


CASES = [
    *(
        _today(
            f"ranks of {kind}", "'allocation.policy: tsqlora' changes ranks", f"'adapter.type: {kind}' cannot change",
            "set 'allocation.policy: fixed'", adapter={"method": kind}, allocation={"policy": "tsqlora"},
        )
        for kind in ("bitfit", "houlsby", "pfeiffer", "prompt", "prefix", "full")
    ),
    *(
        _today(
            f"scores of {kind}", f"'adapter.type: {kind}' has none that are exact", "set 'sampling.selector: full'",
            adapter={"method": kind}, sampling={"selector": "quality"},
        )
        for kind in ("bitfit", "prompt", "prefix", "full")
    ),
    *(
        settings(
            f"{kind} on a 4-bit base", f"'adapter.type: {kind}' trains parameters of the base itself",
            "set 'model.quantization: none'", adapter={"method": kind}, model={"quantization": "nf4"},
        )
        for kind in ("bitfit", "full")
    ),
    *(
        settings(
            f"init with {name}", "init: pissa", words, adapter={"method": "lora", "init": "pissa"} | adapter, **sections
        )
        for name, words, adapter, sections in (
            ("a 4-bit base", "takes factors out of weights", {}, {"model": {"quantization": "nf4"}}),
            (
                "a look at the base", "looks at the base alone", {"type": "lora"},
                {"sampling": {"selector": "k_center", "keep_fraction": 0.5}},
            ),
            ("biases", "is of LoRA's two factors, and not for 'adapter.type: bitfit'", {"method": "bitfit"}, {}),
            ("an adapter", "remove one of them", {"init_from": "there"}, {}),
        )
    ),
    *(
        settings(
            f"label words of a base that {key} changes",
            f"'task.label_words: auto' asks the base alone, which '{key}' changes",
            task={"prompt": "{text} It was {mask}.", "label_words": "auto"}, adapter=adapter, **sections,
        )
        for key, adapter, sections in (
            ("adapter.init_from", {"method": "full", "init_from": "there"}, {}),
            ("pretrain", {"method": "bitfit"}, {"pretrain": {"objective": "mlm"}}),
            ("adapter.init: pissa", {"method": "lora", "init": "pissa"}, {}),
        )
    ),
    settings(
        "init with dropout", "adapter.init='pissa'", "adapter.dropout=0.1 of their input would drop",
        adapter={"method": "lora", "init": "pissa", "dropout": 0.1},
    ),
    _today(
        "init with ranks of a file", "draws factors of its ranks", "'adapter.init: eva' starts them otherwise",
        adapter={"method": "lora", "init": "eva"}, allocation={"policy": "file", "file": "x"},
    ),
    _today(
        "ranks of a file for biases", "gives ranks to layers, and 'adapter.type: bitfit' has none",
        adapter={"method": "bitfit"}, allocation={"policy": "file", "file": "x"},
    ),
    settings(
        "layers of bottlenecks", "'adapter.type: houlsby' chooses no linear layers; remove 'target_modules'",
        adapter={"method": "houlsby", "target_modules": ["query"]},
    ),
    settings(
        "dropout of biases", "'adapter.type: bitfit' has no factors whose input 'dropout' (0.1)", "remove it",
        adapter={"method": "bitfit", "dropout": 0.1},
    ),
    settings(
        "a filter's rank without one", "'filter_rank' is of 'adapter.type: loratrf', not of 'adapter.type: lora'",
        adapter={"filter_rank": 2},
    ),
    settings(
        "a filter's rank above its width", "adapter.filter_rank=33: no T has a rank above 32; lower it",
        adapter={"method": "loratrf", "filter_rank": 33},
    ),
    settings(
        "a bottleneck that is none", "adapter.r=33", "is narrower than what it stands behind, 32; lower it",
        adapter={"method": "houlsby", "r": 33},
    ),
    settings(
        "prompt tokens without a prompt", "'prompt_tokens' is of 'adapter.type: prompt' and 'prefix', not of "
        "'adapter.type: bitfit'; remove it", adapter={"method": "bitfit", "prompt_tokens": 5},
    ),
    settings(
        "a prompt's text for prefixes", "'prompt_text' is of 'adapter.type: prompt', not of 'adapter.type: prefix'",
        adapter={"method": "prefix", "prompt_text": "good film"},
    ),
    settings(
        "a prompt's text that is none", "adapter.prompt_text=' ': has no tokens; give a text that has some",
        adapter={"method": "prompt", "prompt_text": " "},
    ),
    settings(
        "a prompt that leaves no positions", "task.max_length=32 and adapter.prompt_tokens=33",
        "the model takes 64 tokens; lower either", adapter={"method": "prompt", "prompt_tokens": 33},
    ),
    settings(
        "prefixes in a kernel without masks", "'adapter.type: prefix' puts keys before those of a text",
        "'model.attention: flash_attention_2' has no mask", adapter={"method": "prefix"},
        model={"attention": "flash_attention_2", "dtype": "bf16"},
    ),
    *(
        _on(
            kind, f"prefixes of {kind}", "adapter.type='prefix'", "computes attention in a way of its own",
            "choose adapter.type=prompt or lora", method="prefix",
        )
        for kind in ("deberta", "mpnet")
    ),
    _on(
        "llama", "biases of a model without", "a llama model has no biases", "choose adapter.type=lora",
        method="bitfit",
    ),
    *(
        _on(
            "llama", f"{init} of layers narrower than r", f"adapter.r=20: adapter.init='{init}'", "k_proj has 16",
            "lower it, or leave such layers out", method="lora", init=init, r=20,
        )
        for init in ("pissa", "olora")
    ),
    _on(
        "gpt2", "values that have no layer of their own", "adapter.target_modules='loratrf'",
        "GPT2ForSequenceClassification has no layer for the values alone", "name the layers, or set auto",
        method="loratrf",
    ),
    *(
        Case(
            f"FSDP2 with a {kind}", (f"adapter.type='{kind}'", "FSDP2", "use DDP or ZeRO"),
            lambda place, kind=kind: place.set(adapter={"method": kind}), "train", FSDP,
        )
        for kind in ("prompt", "prefix")
    ),
    Case(
        "FSDP2 with all parameters", ("adapter.type='full'", "FSDP2", "use DDP or ZeRO"),
        lambda place: place.set(adapter={"method": "full"}), "train", FSDP,
    ),
]  # fmt: skip
