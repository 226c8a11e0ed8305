"""Small helpers that several modules share."""

import importlib
from types import ModuleType


class MissingExtraError(ImportError, ValueError):
    """An optional package is needed for what was asked; the message says which extra of flow-trl installs it."""


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """
    Imports an optional dependency, or says how to install it.

    Args:
        module (`str`):
            Name of the module to import, for example `"matplotlib.pyplot"`.
        extra (`str`):
            The extra of flow-trl that installs it, for example `"plots"`.
        purpose (`str`):
            What it is needed for; the error message begins with it.

    Returns:
        `ModuleType`: the imported module.

    Raises:
        MissingExtraError: if the module cannot be imported.

    Example:

    ```python
    >>> plt = import_extra("matplotlib.pyplot", extra="plots", purpose="the learning curve")
    ```
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs `{module}`, which cannot be imported ({error}). "
            f'Install it with `pip install "flow-trl[{extra}]"`.'
        ) from error
