"""Old import path, kept for scripts written before: import it from `moodistill`."""

from moodistill.bundle.int8 import Int8Config

__all__ = ["Int8Config"]
