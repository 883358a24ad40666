"""A YAML file and ``section.key=value`` overrides as nested mappings; no file makes reading it costly."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown

#: Bytes of a file, values in it with every alias written out, and levels of nesting.
MOST_BYTES = 2**20
MOST_NODES = 20_000
MOST_LEVELS = 30


#: The mappings of a file, an override's key and its value without quotes -> keys, as ``section.name``.
Resets = Callable[[Mapping[str, Any], str, str], Sequence[str]]


def read_tree(
    path: Path, overrides: Sequence[str], *, sections: Sequence[str], resets: Resets | None = None
) -> dict[str, Any]:
    """The file's mappings with the overrides in them, interpolations resolved.

    Args:
        sections: names of the top-level mappings, for messages.
        resets: the keys of a file's mappings that an override, a key and its value, takes out, as it stands for them.

    Raises:
        UserError: naming the file or the override, the place, and the remedy.
    """
    text = _read(path)
    is_mapping = _check_size(text, str(path))
    if not is_mapping:
        raise UserError(f"{path}: must be a mapping of sections ({', '.join(sections)})")
    try:
        tree: Any = OmegaConf.load(io.StringIO(text))
    except Exception as error:  # YAML errors come in several classes of two libraries
        raise UserError(f"{path}: not valid YAML: {_reason(error)}") from None
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key.strip() or key.startswith("-"):
            raise UserError(f"override {shown(override)} is not of the form section.key=value")
        where = f"override {shown(override)}"
        if not _is_text(override):
            raise UserError(f"{where}: not UTF-8 text; check the terminal's encoding")
        _check_size(value, where)
        try:
            written: Any = OmegaConf.to_container(tree, resolve=False)
            for reset in () if resets is None else resets(written, key.strip(), _unquoted(value)):
                _remove(tree, reset, kept=overrides)
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([override]))
        except Exception as error:
            raise UserError(f"{where}: {_reason(error)}") from None
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{path}: {key}{_reason(error)}") from None
    except RecursionError:
        raise UserError(f"{path}: an interpolation ${{...}} leads back to itself; write the value out") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _unquoted(value: str) -> str:
    """An override's value as YAML reads it, as text; a list or mapping as it is written."""
    node = yaml.compose(value, Loader=yaml.SafeLoader)
    return str(node.value) if isinstance(node, yaml.ScalarNode) else value.strip()


def _remove(tree: Any, key: str, *, kept: Sequence[str]) -> None:
    """Take ``section.name`` out, unless an override sets it."""
    section, name = key.split(".")
    values = OmegaConf.select(tree, section)
    if OmegaConf.is_dict(values) and name in values and not any(o.partition("=")[0].strip() == key for o in kept):
        del values[name]


def check_strings(tree: Any) -> None:
    """Check that every string can be written to a file, and be part of a path.

    Raises:
        UserError: naming the key.
    """
    for key, value in _leaves(tree):
        for text in (key, value):
            if isinstance(text, str) and "\0" in text:
                raise UserError(f"{key}={shown(value)}: holds a NUL character; remove it")
            if isinstance(text, str) and not _is_text(text):
                raise UserError(f"{key}={shown(value)}: cannot be written as UTF-8; remove the surrogate characters")


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    stack: list[tuple[str, Any]] = [("", tree)]
    while stack:
        key, value = stack.pop()
        prefix = f"{key}." if key else ""
        if isinstance(value, dict):
            stack += [(f"{prefix}{name}", inner) for name, inner in value.items()]
        elif isinstance(value, list | tuple):
            stack += [(f"{prefix}{place}", inner) for place, inner in enumerate(value)]
        else:
            yield key, value


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"config file {str(path)!r} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in a name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"config file {str(path)!r} cannot be read ({reason}); give a YAML file") from None
    if len(content) > MOST_BYTES:
        raise UserError(f"{path}: larger than {MOST_BYTES} bytes; that is no config, give a YAML file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _check_size(text: str, where: str) -> bool:
    """Count what the document is without building it: aliases can stand for exponentially many values.

    Returns:
        Whether it is a mapping, or nothing at all.

    Raises:
        UserError: not YAML, too many values, too deep, or an alias that is in itself or has no anchor.
    """
    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # anchors of the collections around, and the count before them
    count = 0
    is_mapping: bool | None = None
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            place = f"line {event.start_mark.line + 1}" if event.start_mark else ""
            if isinstance(event, yaml.NodeEvent) and is_mapping is None:
                nothing = isinstance(event, yaml.ScalarEvent) and event.value in ("", "~", "null") and not event.style
                is_mapping = isinstance(event, yaml.MappingStartEvent) or nothing
            if isinstance(event, yaml.AliasEvent):
                if event.anchor not in sizes:
                    why = "is inside itself" if event.anchor in [name for name, _ in open_] else "has no anchor"
                    raise UserError(f"{where}, {place}: the alias *{event.anchor} {why}; write the value out")
                count += sizes[event.anchor]
            elif isinstance(event, yaml.ScalarEvent):
                count += 1
                if event.anchor:
                    sizes[event.anchor] = 1
            elif isinstance(event, yaml.CollectionStartEvent):
                open_.append((event.anchor, count))
                count += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = open_.pop()
                if anchor:
                    sizes[anchor] = count - before
            if count > MOST_NODES:
                raise UserError(
                    f"{where}, {place}: more than {MOST_NODES} values, with what aliases of anchors stand for; "
                    "a config has some dozens"
                )
            if len(open_) > MOST_LEVELS:
                raise UserError(f"{where}, {place}: nested more than {MOST_LEVELS} levels deep; a config has three")
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {_reason(error)}") from None
    return is_mapping is not False


def _reason(error: Exception) -> str:
    text = str(error)
    for name in ('in "<unicode string>", ', 'in "<file>", '):
        text = text.replace(name, "")
    return " ".join(text.split())
