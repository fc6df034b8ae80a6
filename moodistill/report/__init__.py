"""Pictures of a run: figures, and the HTML page.

Knows rows and the store as they lie on disk; no torch, no pymoo. Begin with `page`.
"""
