"""What people look at: figures, and the offline HTML page.

May know: rows and the store as they lie on disk; no torch, no pymoo. matplotlib is
imported in this room alone.
Begin with `page.write_report`.
"""
