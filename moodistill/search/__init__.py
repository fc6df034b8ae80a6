"""NSGA-II over genomes: problem, operators, surrogate, and the loop that drives them.

The only room that knows pymoo; it knows no torch: what scores a student is an `Executor` that it is
given. Begin with `driver`.
"""
