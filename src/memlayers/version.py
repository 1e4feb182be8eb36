"""The version of this package: what it writes beside its results, and what the build reads."""

__version__ = "0.2.0.dev0"
