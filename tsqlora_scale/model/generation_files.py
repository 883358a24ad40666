"""A base's own generation settings: its ``generation_config.json``, or without one its ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tsqlora_scale.common.errors import UserError

FILE = "generation_config.json"


def check_generation_file(folder: Path, model_config: Any, *, key: str) -> None:
    """The settings in a base's folder, as far as an evaluation keeps them.

    Transformers takes a file that it cannot read for one that is not there, and the settings of others.

    Args:
        folder: of the base; nothing is checked where it has no such file.
        model_config: the base's.
        key: for messages.

    Raises:
        UserError: naming the file, and what in it is wrong.
    """
    from tsqlora_scale.tasks.objectives.decoding import unfit

    path = folder / FILE
    if not path.exists():
        path = folder / "config.json"
        if not path.exists():
            return
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: {path} cannot be read as JSON ({error}); mend it, or remove it to generate without settings of "
            "the model's own"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{key}: {path} holds no object of settings; mend it, or remove it")
    text_config = model_config.get_text_config()
    problem = unfit(found, getattr(text_config, "vocab_size", None) or model_config.vocab_size)
    if problem is not None:
        raise UserError(f"{key}: {path}: {problem}; mend it, or leave it out")


def settings_that_load(name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """``generation_config=`` for a model whose own settings Transformers refuses when it loads the model.

    Some settings contradict each other, or need what is not there; evaluation keeps none of those.

    Args:
        name_or_path: the base.
        revision: of a hub name.

    Returns:
        Nothing where the model's own settings load.
    """
    from transformers import GenerationConfig
    from transformers.utils.hub import cached_file

    from tsqlora_scale.tasks.objectives.decoding import kept_settings

    for name in (FILE, "config.json"):
        path = cached_file(name_or_path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path is None:
            continue
        found = json.loads(Path(path).read_bytes())
        try:
            GenerationConfig.from_dict(found)
        except Exception:  # whatever a wrong value leads to
            kept = kept_settings(found, num_beams=2, is_encoder_decoder=True)
            return {"generation_config": GenerationConfig(**kept)}
        return {}
    return {}


def write_settings(given: Any, folder: Path) -> None:
    """Write settings as ``save_pretrained`` does, without its refusal of what loading a base only warns of."""
    given.to_json_file(str(folder / FILE), use_diff=True, keys_to_pop=["compile_config"])


def add_settings(folder: Path, find: Callable[[Any], dict[str, Any]]) -> None:
    """Add settings to those of a model that has been written; nothing where the folder has none.

    Args:
        find: from the tokens that end a text by what is written to what is added.
    """
    path = folder / FILE
    if not path.exists():
        return
    given = json.loads(path.read_bytes())
    added = find(given.get("eos_token_id"))
    if added:
        path.write_text(json.dumps(given | added, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """``save_pretrained`` of a model, whatever its base's generation settings are.

    Args:
        options: of ``save_pretrained``.
    """
    given = getattr(model, "generation_config", None)
    if given is None:
        model.save_pretrained(str(folder), **options)
        return
    model.generation_config = type(given)()
    try:
        model.save_pretrained(str(folder), **options)
    finally:
        model.generation_config = given
    if (folder / FILE).exists():
        write_settings(given, folder)
