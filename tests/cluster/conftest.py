"""Fixtures of this room."""

from helpers.dask import environment  # noqa: F401
