"""What `pip install memlayers` does not bring: said in a sentence where it is needed first."""

import importlib.util


def require_extra(extra: str, what: str, *packages: str) -> None:
    """Raise `ModuleNotFoundError` that says how to install what `what` needs, if one of the packages is not there."""
    for name in packages:
        try:
            is_there = importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):  # it is kept from being imported
            is_there = False
        if not is_there:
            raise ModuleNotFoundError(f"{what} needs {name}: pip install 'memlayers[{extra}]'", name=name)
