"""The folder that goes to a device: `model.onnx`, manifest, model card, `run.py`, and their checks.

A bare model gets its normalisation and labels (`model`), is compared with torch on real images
(`parity`), quantised if that pays (`int8`), and completed to a folder (`folder`) that `verify`
checks anywhere. `run_script` is copied into it as `run.py` and imports numpy and onnxruntime alone.

May know: `onnx`, `data`, `pareto`; no genome, no student, no search.
Begin with `folder.write_package`.
"""
