"""Structural distillation of CNNs as a Pareto search over masks and connections."""

__version__ = "0.1.0"
