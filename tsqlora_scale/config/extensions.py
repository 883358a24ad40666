"""Code of a user's own, named in the config: ``FILE.py:NAME`` or ``package.module:NAME``.

A policy, a selector or an objective that is not in the package is a class in a file of the user's. The config names
it, so that it works under every launcher and the resolved config says what was run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from tsqlora_scale.common.errors import UserError
from tsqlora_scale.common.printing import shown

_FORM = re.compile(r"(?P<module>[\w./\\-]+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")


def is_extension(value: str) -> bool:
    """Whether a config value has the form of an extension's name."""
    return _FORM.fullmatch(value) is not None


def load_extension(value: str, *, key: str) -> Any:
    """What ``value`` names.

    Args:
        value: ``FILE.py:NAME``, the file from the current folder, or ``package.module:NAME``.
        key: the config key that holds it, for messages.

    Raises:
        UserError: no such module or name, or importing the module fails.
    """
    found = _FORM.fullmatch(value)
    assert found is not None, value
    try:
        module = _module(found["module"])
    except Exception as error:  # whatever the user's code raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{key}={shown(value)}: {found['module']!r} cannot be imported ({reason}); "
            "give FILE.py:NAME or package.module:NAME"
        ) from None
    if not hasattr(module, found["name"]):
        raise UserError(f"{key}={shown(value)}: {found['module']!r} defines no {found['name']!r}; check the spelling")
    return getattr(module, found["name"])


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where).resolve()
    # one module a file, however often it is named: two copies of a class are two classes
    name = f"tsqlora_extension_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
