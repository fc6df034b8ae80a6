"""Students of the front made ready: distilled, tested, exported, and measured again.

`distil` trains one student and writes `students/<id>/`; `confirm` measures the latencies of the
front and of these files a second time and writes `confirmed.json`.

May know: `student`, `training`, `bundle`, `storage`; no pymoo and no search.
Begin with `distil.finish`, then `confirm.confirm`.
"""
