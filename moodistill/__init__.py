"""Pareto fronts of physically smaller CNNs: accuracy, parameters, measured latency."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Int8Config", "LatencyConfig", "LayerRules", "Limits", "Run", "RunStudent", "UserError",
    "open_run", "search",
]  # fmt: skip

if TYPE_CHECKING:
    from moodistill.api import (
        Int8Config,
        LatencyConfig,
        LayerRules,
        Limits,
        Run,
        RunStudent,
        UserError,
        open_run,
        search,
    )  # fmt: skip


def __getattr__(name: str) -> Any:
    # The interface loads torch and pymoo, which take seconds: only when it is asked for.
    if name in __all__:
        from moodistill import api

        return getattr(api, name)
    raise AttributeError(f"module 'moodistill' has no attribute {name!r}")
