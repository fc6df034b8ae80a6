"""A run from start to finish: search, finalists, the written front; resume, export, clean.

Everything below is put together here. Begin with `run`, which calls the stages in turn: `search`,
`finish`, `results`. They share a `session.Session`; `backend` makes what scores, times and distils.
"""
