"""A run from start to finish: search, finalists, the written front; resume, export, clean.

Everything below is put together here. Begin with `run`.
"""
