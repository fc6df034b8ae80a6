"""Files: written whole or not at all, JSON records with types, the cache, safetensors.

May know: the errors, nothing else of the project.
Begin with `atomic.write_atomic`.
"""
