"""For whoever writes kernels of a GPU: what they compile to (`compiled`), what they touch (`interpreted`).

Scripts beside this folder import it as `kernel_tools`, and so do the tests (`pythonpath` in pyproject.toml).
"""
