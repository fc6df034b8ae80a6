"""A run's folder: its `run.json`, the store of evaluations, the lock of its writer.

Knows SQLite and what an evaluation is; no torch, no pymoo. Begin with `store`.
"""
