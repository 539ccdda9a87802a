"""Imports that wait: a heavy module is loaded when it is first used, so --help and a mistyped flag take no seconds.

with when_used():
    import torch

    from support import processes
"""

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
import importlib
from types import SimpleNamespace


@contextmanager
def when_used() -> Iterator[None]:
    """Modules that are imported in this block are loaded when something of them is first asked for.

    For `import module` and `from package import module` alone. Python 3.15 has `lazy import` for it (PEP 810).
    """
    before, builtins.__import__ = builtins.__import__, _promise
    try:
        yield
    finally:
        builtins.__import__ = before


def _promise(name, globals=None, locals=None, names=None, level=0):
    if "." in name and not names:
        raise ImportError(f"import {name}: write `from ... import ...`, which binds the module itself")
    return SimpleNamespace(**{part: _Module(f"{name}.{part}") for part in names}) if names else _Module(name)


class _Module:
    """Stands for a module; keeps nothing of it, so that what is put into the module later is seen."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        return getattr(importlib.import_module(self._name), attribute)
