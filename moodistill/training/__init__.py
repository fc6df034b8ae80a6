"""Gradient training: distillation of students, and of a teacher from labels.

May know: `data`, and the teacher's network; no genomes, no search, no ONNX.
Begin with `distill.distill`; `teacher.train_teacher` trains a teacher.
"""
