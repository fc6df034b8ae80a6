"""Finalists: distilled, exported, tested, and their latency measured again.

Knows students and training; no pymoo. Begin with `distil`, then `confirm`.
"""
