"""What was measured of a student, the objectives made of it, fronts, and choosing from one.

`evaluation` holds measurements; `objectives` turns them into what a search minimises (a latency
becomes an objective here) and into limits; `geometry` has fronts, knees and finalists; `table` is
`pareto.csv`; `choose` picks a student.

May know: numpy and `io`; no network, no pymoo.
Begin with `evaluation.Evaluation`, then `objectives.MEASURES`.
"""
