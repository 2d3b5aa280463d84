"""Optional libraries, imported when a file needs them. No torch."""

from __future__ import annotations

import importlib
from types import ModuleType

from shoal.errors import DataError
from shoal.system.output import on_one_line


def import_extra(module: str, name: str) -> ModuleType:
    """Return a module that reading `name` needs. Raises DataError that names the extra if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise DataError(f"reading {on_one_line(name)} needs {library}: pip install 'shoal[data]'") from error
