"""What was measured of a student, the objectives made of it, fronts, and how one is chosen.

Knows numpy and the standard library alone. Begin with `evaluation`, then `objectives`.
"""
