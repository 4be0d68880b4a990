"""The formats' own libraries, loaded when they are needed."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

from ..errors import MissingPackageError


def require(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is not None and re.match(rf"{package}(\.|$)", missing.name):
            raise MissingPackageError(
                f"this export needs the package {package}: pip install 'fx_instrument[export]'"
            ) from missing
        raise
