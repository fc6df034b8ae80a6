"""The folder that goes to a device: `model.onnx`, manifest, card, `run.py`, and its checks.

Knows the ONNX room and the data; no search. Begin with `folder`.
"""
