"""Dask: workers that score, distil and time for a run.

Begin with `client`; `tasks` is what runs on a worker, `executor` what the search sees.
"""
