"""Files: written whole or not at all, records as JSON, caches, safetensors.

Knows nothing of the project but its errors. Begin with `atomic`.
"""
