"""Dask: other processes and machines score, distil and time for a run.

`client` connects and waits for workers, `tasks` is what runs on them, `executor` and `meter` are
what the search and the run see: the same interfaces as for this process alone.

May know: `finalists`, `config` and all floors below; no run. Dask is imported in this room alone.
Begin with `client.connect`, then `tasks.score`.
"""
