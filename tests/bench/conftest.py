import gc
import importlib.util

import pytest

from memlayers.bench.shapes import shape


@pytest.fixture(autouse=True)
def _what_is_imported_stays_frozen(monkeypatch):
    """Otherwise every look of Python's collector after a run, of which there are many here, goes through it all."""
    monkeypatch.setattr(gc, "unfreeze", lambda: None)


@pytest.fixture
def tiny():
    return shape("tiny")


@pytest.fixture
def without_numba(monkeypatch):
    """The bench as it is where Numba is not installed: the limits of rows in plain torch, and nothing to compile."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "numba" else find(name, *rest))
