"""The README of an adapter or a merged model: what it is made of, how it was made, how it is opened."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from tsqlora_scale.common.files import written_whole
from tsqlora_scale.common.printing import printable
from tsqlora_scale.config.dataset_section import DatasetConfig
from tsqlora_scale.config.locations import lasting, resolve
from tsqlora_scale.config.model_section import ADAPTER_TRAITS
from tsqlora_scale.config.prompt_template import words_by_class
from tsqlora_scale.config.schema import Config

NAME = "README.md"
#: task type -> the hub's name of it, and the end of the names of its auto classes
_TASKS = {
    "classification": ("text-classification", "SequenceClassification"),
    "regression": ("text-classification", "SequenceClassification"),
    "causal": ("text-generation", "CausalLM"),
    "seq2seq": ("text2text-generation", "Seq2SeqLM"),
    "masked": ("fill-mask", "MaskedLM"),
}


def write_card(
    folder: Path, config: Config, result: Mapping[str, Any], *, merged: bool = False, gguf_file: str | None = None
) -> None:
    """Write the card of a trained adapter, or of a model that it was merged into.

    Args:
        result: what ``result.json`` holds; empty where it is not known.
        gguf_file: name of the file that a merged model is in.
    """
    card = model_card(config, result, merged=merged, gguf_file=gguf_file)
    with written_whole(folder / NAME) as partial:
        partial.write_text(card, encoding="utf-8")


def result_beside(adapter: Path) -> dict[str, Any]:
    """``result.json`` of the run whose ``adapter/`` this is; empty where there is none."""
    if adapter.name != "adapter":  # a checkpoint's, which it is not about, or one from elsewhere
        return {}
    try:
        found = json.loads((adapter.parent / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def model_card(config: Config, result: Mapping[str, Any], *, merged: bool, gguf_file: str | None = None) -> str:
    """Markdown after YAML, as hubs read it."""
    base = lasting(config.model.name_or_path, key="model.name_or_path")
    metrics = result.get("metrics", {})
    data = ModelCardData(
        base_model=base,
        library_name="transformers" if merged or ADAPTER_TRAITS[config.adapter.type].own else "peft",
        license="unknown",
        pipeline_tag=_TASKS[config.task.prompt_base or config.task.type][0],
        datasets=list(dict.fromkeys(each.name for each in config.task.datasets if each.name)) or None,
        metrics=list(metrics) or None,
        tags=[f"base_model:{'finetune' if merged else 'adapter'}:{base}", config.adapter.type, "tsqlora"],
    )
    what = "model, an adapter merged into its base" if merged else f"{config.adapter.type} adapter"
    revision = f" (revision `{config.model.revision}`)" if config.model.revision else ""
    parts = [
        f"# {printable(config.run.name)}",
        f"A {what}, for {config.task.type}. Base: `{printable(base)}`{revision}"
        + (", in 4-bit (nf4)." if config.model.quantization == "nf4" and not merged else "."),
        "The licence is not known to what wrote this page: that of the base and of the data apply.",
        "## Data",
        "\n".join(f"- {line}" for line in _data(config, result)),
        *_prompt(config),
        *_metrics(result),
        *_ranks(result),
        "## Made with",
        f"```bash\n{_command(result)}\n```",
        "where `config.yaml` is that of the run folder."
        + "".join(f" {name} {version}." for name, version in result.get("versions", {}).items()),
        "## Use",
        f"```python\n{_use(config, merged=merged, gguf_file=gguf_file)}\n```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def for_hub(text: str) -> str:
    """A card without what a hub refuses: a base that is no repository, but a folder."""
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    base = str(data.base_model)
    try:
        validate_repo_id(base)
        return text
    except HFValidationError:
        data.base_model = None
        data.tags = [tag for tag in data.tags or [] if not tag.startswith("base_model:")]
        return str(card)


def _data(config: Config, result: Mapping[str, Any]) -> Iterator[str]:
    for dataset in config.task.datasets:
        if dataset.name is not None:
            subset = f", {dataset.subset}" if dataset.subset else ""
            yield f"`{printable(dataset.name)}`{subset}: split `{dataset.train_split}`"
        for name, size in _files(dataset):
            yield f"`{printable(name)}`" + (f", {size:,} bytes" if size is not None else "")
    for name, each in (result.get("draws_by_set") or {}).items():
        yield f"{printable(name)}: {each['drawn']:,} draws of {each['pool']:,} samples"
    if "pool_size" in result:
        yield f"{result['pool_size']:,} samples, {result['distinct_samples_seen']:,} of them seen"


def _files(dataset: DatasetConfig) -> Iterator[tuple[str, int | None]]:
    """Names of the data's files, without the folders of this machine, and their sizes in bytes."""
    folder = Path(resolve(dataset.path, key="task.dataset.path")) if dataset.path else Path()
    for _, name in dataset.files:
        path = folder / name
        yield path.name, path.stat().st_size if path.is_file() else None


def _prompt(config: Config) -> list[str]:
    """What a base is asked, and how its answer is read."""
    task = config.task
    if task.prompt is None or not isinstance(task.label_words, list | dict):
        return []
    labels = task.labels if isinstance(task.labels, list) else [str(number) for number in range(task.num_labels)]
    pairs = zip(labels, words_by_class(task.label_words, task.labels), strict=False)
    words = ", ".join(f"{printable(name)}: `{printable(word)}`" for name, word in pairs)
    shown = f" Before it stand the {len(task.demonstrated)} answered rows of `task.demonstrated` in the run's config."
    return [
        "## Prompt",
        f"`{printable(task.prompt)}`; the class is the one whose word's (first) token has the largest logit ({words})."
        + (shown if task.demonstrated else ""),
    ]


def _metrics(result: Mapping[str, Any]) -> list[str]:
    metrics = result.get("metrics", {})
    if not metrics:
        return []
    before = result.get("metrics_before", {})
    rows = [f"| {name} | {before[name]:.4f} |" if name in before else f"| {name} | |" for name in metrics]
    rows = [f"{row} {value:.4f} |" for row, value in zip(rows, metrics.values(), strict=True)]
    return ["## Metrics", "On the held-out set.", "\n".join(["| | before | after |", "| --- | --- | --- |", *rows])]


def _ranks(result: Mapping[str, Any]) -> list[str]:
    ranks = result.get("kept", {}).get("ranks") or result.get("ranks_end", {})  # of what is kept
    if not ranks:
        return []
    counts = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(Counter(ranks.values()).items()))
    more = f"; {result['trainable_parameters']:,} parameters trained in {result['steps']:,} steps"
    return ["## Ranks", f"{len(ranks)} layers: {counts}{more}."]


def _command(result: Mapping[str, Any]) -> str:
    size = result.get("world_size", 1)
    start = f"accelerate launch --num_processes {size}" if size > 1 else "python"
    return f"{start} launch/train.py --config config.yaml"


def _use(config: Config, *, merged: bool, gguf_file: str | None) -> str:
    """Python that opens it. Classes are named, as the base's own config need not have them."""
    kind, is_headed = _TASKS[config.task.prompt_base or config.task.type][1], config.task.prompt is None
    labels = config.task.labels if is_headed else None
    names = dict(enumerate(labels)) if isinstance(labels, list) else None
    more = f", id2label={names!r}" if names and not merged else ""
    if config.task.num_labels and is_headed and not more and not merged:
        more = f", num_labels={config.task.num_labels}"
    file = "" if gguf_file is None else f", gguf_file={gguf_file!r}"
    own = ADAPTER_TRAITS[config.adapter.type].own and not merged
    library, prefix = ("transformers", "AutoModelFor") if merged or own else ("peft", "AutoPeftModelFor")
    name = printable(lasting(config.model.name_or_path, key="model.name_or_path"))
    if kind == "MaskedLM" and library == "peft":  # which has no auto class of it
        auto = f"AutoModelFor{kind}"
        return (
            f"from peft import PeftModel\nfrom transformers import {auto}, AutoTokenizer\n\n"
            f'base = {auto}.from_pretrained("{name}"{file})\nmodel = PeftModel.from_pretrained(base, ".")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("."{file})'
        )
    if own:
        auto = f"{prefix}{kind}"
        return (
            f"from transformers import {auto}, AutoTokenizer\nfrom tsqlora_scale import load_adapter\n\n"
            f'base = {auto}.from_pretrained("{name}"{more})\nmodel = load_adapter(base, ".")\n'
            'tokenizer = AutoTokenizer.from_pretrained(".")'
        )
    auto = f"{prefix}{kind}"
    return (
        f"from {library} import {auto}\nfrom transformers import AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("."{more}{file})\ntokenizer = AutoTokenizer.from_pretrained("."{file})'
    )
