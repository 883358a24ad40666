"""Methods as presets over the keys that they stand for, and the keys of release 0.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from tsqlora_scale.config.model_section import AdapterConfig
from tsqlora_scale.config.quality_sections import SamplingConfig, ScoringConfig
from tsqlora_scale.config.rank_sections import AllocationConfig, SensitivityConfig

#: The keys that ``adapter.method`` stands for.
PRESET_KEYS = ("adapter.type", "sampling.selector", "allocation.policy")
#: Their values, by method. Without a word about scores ``tsqlora`` draws evenly: no choice without a query was found to
#: beat even draws that are tuned as well (docs/results.md).
PRESETS = {
    "tsqlora": ("lora", "full", "tsqlora"),
    "lora": ("lora", "full", "fixed"),
    "rslora": ("rslora", "full", "fixed"),
    "dora": ("dora", "full", "fixed"),
    "adalora": ("svd", "full", "adalora"),
    "elalora": ("svd", "full", "elalora"),
    "loratrf": ("loratrf", "full", "fixed"),
    "bitfit": ("bitfit", "full", "fixed"),
    "houlsby": ("houlsby", "full", "fixed"),
    "pfeiffer": ("pfeiffer", "full", "fixed"),
    "prompt": ("prompt", "full", "fixed"),
    "prefix": ("prefix", "full", "fixed"),
    "full": ("full", "full", "fixed"),
}
#: What a policy of a paper means by more keys than its own, where they are not set.
POLICY_VALUES: dict[str, dict[str, Any]] = {
    "adalora": {"sensitivity.window": None, "sensitivity.uncertainty": 0.85, "allocation.r_min": 0},
    "elalora": {"sensitivity.window": None, "sensitivity.uncertainty": 0.85},
}
#: AdaLoRA's γ, the one of most of its GLUE tasks.
ORTHOGONALITY = 0.1
#: What a method says of other keys, and what every other method says of them.
MORE_OF_PRESETS = {"loratrf": {"adapter.target_modules": "loratrf"}}
USUAL = {"adapter.target_modules": "auto"}


def taken_out(tree: Mapping[str, Any], key: str, value: str) -> list[str]:
    """What a method that is given on the command line takes out of a file: what it has values of its own for (of
    :data:`USUAL` keys where they have the usual value), and, in a config that is spelled out, those that the file's
    own method has given.

    Args:
        tree: the file's mappings.
        key, value: of an override.
    """
    if key != "adapter.method":
        return []
    before = str(_get(tree, "adapter.method", "tsqlora"))
    new, old = (PRESETS[name][2] if name in PRESETS else "" for name in (value, before))
    found = [*PRESET_KEYS, "adapter.orthogonality", *POLICY_VALUES.get(new, ())]
    given = POLICY_VALUES.get(str(_get(tree, "allocation.policy", old)), {}) | MORE_OF_PRESETS.get(before, {})
    found += [name for name, its in given.items() if _is_whole(tree, name) and _get(tree, name) == its]
    return found + [name for name in MORE_OF_PRESETS.get(value, ()) if _get(tree, name) == USUAL[name]]


def _is_whole(tree: Mapping[str, Any], key: str) -> bool:
    """Whether a key's section has nearly all keys, as in a config that is spelled out, be it by an older release."""
    section = key.split(".")[0]
    values, known = tree.get(section), _SECTIONS[section].model_fields
    return isinstance(values, Mapping) and len(known.keys() & values.keys()) >= 0.7 * len(known)


#: Of which some methods say more than which they are.
_SECTIONS: dict[str, type[BaseModel]] = {
    "adapter": AdapterConfig,
    "sensitivity": SensitivityConfig,
    "allocation": AllocationConfig,
}
#: Keys that only scores have a use for. Not the technical ones, nor those of an audit.
WORDS_OF_SCORES = {
    "scoring": (
        *("source", "warmup_steps", "preset", "weights", "eta", "delta_loss", "convergence", "mean_gradient"),
        *("convergence_form", "sketch_dim", "max_samples", "proxy_model", "refresh", "refresh_fraction"),
    ),
    "sampling": ("tau", "keep_fraction", "redundancy", "similarity", "unbiased", "use"),
}


def with_preset(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config's mapping with the keys of its method spelled out; those that it sets itself win.

    ``tsqlora`` chooses by the query where there is one, and by quality where the config says how to score or to draw.
    """
    method = _get(tree, "adapter.method")
    if not _is_set(tree, "adapter.method"):  # of none no key follows
        method = "tsqlora"
    values = PRESETS.get(method) if isinstance(method, str) else None
    out = dict(tree)
    if method == "tsqlora" and _get(out, "sampling.selector") is None:
        if _get(out, "task.query") is not None:
            _set(out, "sampling.selector", "query")
        elif _speaks_of_scores(out):
            _set(out, "sampling.selector", "quality")
    for key, value in zip(PRESET_KEYS, values or (), strict=False):
        if _get(out, key) is None:
            _set(out, key, value)
    policy = _get(out, "allocation.policy")
    further = dict(POLICY_VALUES.get(policy, {})) if isinstance(policy, str) else {}
    if method == "adalora" and _get(out, "adapter.type") == "svd":
        further["adapter.orthogonality"] = ORTHOGONALITY
    for key, value in (further | MORE_OF_PRESETS.get(str(method), {})).items():
        if not _is_set(out, key):
            _set(out, key, value)
    return out


def from_0_1(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config of release 0.1 in the keys of today; any other one as it is.

    There the halves of the method had switches, ``scoring.enabled`` and ``sensitivity.enabled``, which every
    ``config.yaml`` of a run spells out, and the plain methods drew evenly whatever ``sampling.selector`` said.

    Raises:
        ValueError: the switch contradicts the selector, as it did there.
    """
    out = dict(tree)
    switches = {name: _get(out, f"{name}.enabled") for name in ("scoring", "sensitivity")}
    if not any(isinstance(value, bool) for value in switches.values()):
        return out
    plain = _get(out, "adapter.method", "tsqlora") != "tsqlora" and _get(out, "adapter.type") is None
    if plain:
        _set(out, "sampling.selector", "full")
    if switches["scoring"] is True and not plain and _get(out, "sampling.selector") is None:
        _set(out, "sampling.selector", "quality")
    for name, value in switches.items():
        if isinstance(value, bool):
            out[name] = {key: entry for key, entry in out[name].items() if key != "enabled"}
    if switches["sensitivity"] is False:
        _set(out, "allocation.policy", "fixed")
    if switches["scoring"] is False and _get(out, "sampling.selector", "quality") == "quality":
        raise ValueError(
            "'scoring.enabled' is no key any more, and 'sampling.selector: quality' needs scores; "
            "to switch quality off set 'sampling.selector: full'"
        )
    return out


def _speaks_of_scores(tree: Mapping[str, Any]) -> bool:
    """Whether some key says how to score or to draw by scores. Where all keys of a section are there, as in a config
    that is spelled out, it is those that differ from their defaults."""
    for section, kind in (("scoring", ScoringConfig), ("sampling", SamplingConfig)):
        values = tree.get(section)
        if isinstance(values, kind):
            values = {name: getattr(values, name) for name in values.model_fields_set}
        if not isinstance(values, Mapping):
            continue
        is_whole = set(kind.model_fields) <= {*values, "selector"}
        for name in WORDS_OF_SCORES[section]:
            default = kind.model_fields[name].get_default(call_default_factory=True)
            if values.get(name) is not None and not (is_whole and values[name] == default):
                return True
    return False


def _get(tree: Mapping[str, Any], key: str, otherwise: Any = None) -> Any:
    section, name = key.split(".")
    values = tree.get(section)
    if isinstance(values, BaseModel):
        found = getattr(values, name) if name in values.model_fields_set else None
    else:
        found = values.get(name) if isinstance(values, Mapping) else None
    return otherwise if found is None else found


def _is_set(tree: Mapping[str, Any], key: str) -> bool:
    """Whether the key is there, be it with the value none."""
    section, name = key.split(".")
    values = tree.get(section)
    if isinstance(values, BaseModel):
        return name in values.model_fields_set
    return isinstance(values, Mapping) and name in values


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    section, name = key.split(".")
    values = tree.get(section, {})
    if isinstance(values, Mapping):
        tree[section] = {**values, name: value}
    elif isinstance(values, BaseModel):
        tree[section] = values.model_copy(update={name: value})
