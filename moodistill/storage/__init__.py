"""The run folder: its `run.json`, the store of evaluations, the lock of its writer.

May know: SQLite, `pareto`, `io`; no torch, no pymoo.
Begin with `store.Store`; `searched.Searched` is what a store says about the front.
"""
