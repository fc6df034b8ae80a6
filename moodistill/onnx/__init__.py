"""The ONNX writer, the INT8 quantiser and ONNX Runtime.

`graph` reads a student's torch graph into the operations of `ops`; `modules` says what each torch
module is in ONNX, `calls` each function and method, `values` what each node stands for; `writer`
makes the bytes; `quantise` makes an INT8 model, `memory` computes what a model needs, `runtime`
runs it.

May know: torch, onnx, `data`; nothing of teachers, genomes, runs or searches.
Begin with `writer.to_onnx`; a new operation goes into `modules` or `calls`.
"""
