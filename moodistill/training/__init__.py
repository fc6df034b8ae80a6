"""Gradient training: distillation of students, and of a teacher from labels.

Knows data and teachers; no genomes, no search. Begin with `distill`.
"""
