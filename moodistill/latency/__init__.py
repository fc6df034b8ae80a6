"""Latency in ONNX Runtime: a process of its own that times models beside the teacher.

Knows numpy and ONNX Runtime alone. Begin with `meter`; `worker` is the process it starts.
"""
