"""NSGA-II over genomes: the ask-and-tell loop, operators, and the surrogate that pre-selects.

`driver` breeds, answers known genomes from the store, has the others scored and tells pymoo;
`algorithms` sets pymoo up; `operators/` breeds; `surrogate` predicts; `problem` turns evaluations
into objectives; `executor` says what scoring looks like from here.

May know: pymoo, which no other room imports, `genome`, `pareto`, `storage`; no torch, no network.
Begin with `driver.Search.run`.
"""
