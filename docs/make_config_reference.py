"""Write docs/config.md from the config's own fields: ``make docs``.

The text of a key is the comment above its field (``#:``), its type and default are those that it is checked by, so the
page cannot say anything else than the code. A test compares the page with what this would write.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tsqlora_scale.config.fields import LARGEST
from tsqlora_scale.config.schema import Config

PAGE = ROOT / "docs" / "config.md"
HEAD = """# Config keys

Made by `make docs` from the fields of `tsqlora_scale/config/`; do not edit it by hand.

A config is a YAML file of the sections below; `section.key=value` on the command line wins over it. An unknown key is
an error that names the nearest known one, and contradictions are found before anything is loaded. Times in steps may be
fractions of the run (strictly between 0 and 1). `launch/train.py --dry-run` prints the whole config with every default.
"""
#: Types by their names in the source, as a reader says them.
WORDS = {
    "PositiveInt": "integer ≥ 1",
    "PositiveFloat": "number > 0",
    "NonNegativeFloat": "number ≥ 0",
    "UnitInterval": "number in (0, 1]",
    "Below1": "number in [0, 1)",
    "StepsOrFraction": "steps, or a fraction of the run",
    "MixedSetConfig": "sets",
    "DistillConfig": "section",
    "Layers": "list of numbers of blocks, or `top:K`",
    "KeptOrNot": "text, `auto` or `off`",
    "IsoDate": "date, as 'YYYY-MM-DD'",
    "bool": "true or false",
    "int": "integer",
    "float": "number",
    "str": "text",
    "None": "null",
}


#: Defaults that a section works out from its other keys.
WORKED_OUT = {("task", "metrics"): "by `type`"}


def comments(section: type[BaseModel]) -> dict[str, tuple[str, str]]:
    """Field -> (the ``#:`` lines above it, its annotation as it is written)."""
    lines = textwrap.dedent(inspect.getsource(section)).splitlines()
    (node,) = ast.parse("\n".join(lines)).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            above, place = [], item.lineno - 2
            while place >= 0 and lines[place].strip().startswith("#:"):
                above.append(lines[place].strip().removeprefix("#:").strip())
                place -= 1
            found[item.target.id] = (" ".join(reversed(above)), ast.unparse(item.annotation))
    return found


def kind(annotation: str) -> str:
    """A type in words."""
    text = re.sub(r"Annotated\[float, Field\(allow_inf_nan=False\)\]", "float", annotation)
    text = re.sub(r"Annotated\[(.*), Field\((.*?)\)\]", lambda m: f"{m[1]}{bounds(m[2])}", text)
    text = re.sub(r"Literal\[(.*?)\]", lambda m: " or ".join(f"`{v}`" for v in re.findall(r"'([^']*)'", m[1])), text)
    text = re.sub(
        r"name_or_extension\((.*?)\)",
        lambda m: " or ".join([*(f"`{v}`" for v in re.findall(r"'([^']*)'", m[1])), "`FILE.py:NAME`", "`module:NAME`"]),
        text,
    )
    text = re.sub(r"dict\[str, ((?:[^\[\]]|\[[^\]]*\])*)\]", r"mapping of names to (\1)", text)
    text = re.sub(r"list\[(.*?)\]", r"list of \1", text)
    for name, words in WORDS.items():
        text = re.sub(rf"(?<![\w`.]){name}(?![\w`:])", words, text)
    return text.replace(" | ", " or ")


def bounds(arguments: str) -> str:
    """Bounds of a field, in words."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{signs[name]} {value}" for name, value in re.findall(r"(ge|gt|le|lt)=([\w. *]+)", arguments)]
    return f" {', '.join(found).replace('LARGEST', str(LARGEST))}" if found else ""


def shown(value: Any) -> str:
    """A default."""
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "empty" if value == "" else f"{value}"


def section_lines(name: str, section: type[BaseModel]) -> list[str]:
    """One section, and the sections in it."""
    lines = [
        f"\n## `{name}`\n",
        " ".join((section.__doc__ or "").split()),
        "",
        "| key | type | default | |",
        "|---|---|---|---|",
    ]
    nested = []
    texts = comments(section)
    for key, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            nested += section_lines(f"{name}.{key}", inner)
            continue
        text, annotation = texts[key]
        default = WORKED_OUT.get((name, key), shown(field.default))
        cells = [f"`{key}`", kind(annotation), default, text]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        for part in get_args(inner):  # a section that may be left out
            if isinstance(part, type) and issubclass(part, BaseModel) and get_origin(inner) is not list:
                nested += section_lines(f"{name}.{key}", part)
    return lines + nested


def page() -> str:
    """The whole page."""
    lines = [HEAD.rstrip()]
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        lines += section_lines(name, field.annotation)
    return "\n".join(lines).replace("``", "`") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
