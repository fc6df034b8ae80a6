"""Our ONNX writer, the INT8 quantiser and ONNX Runtime.

Takes torch graphs of students, gives bytes. Knows nothing of genomes, runs or searches. Begin with
`writer`; a new operation goes into `ops` or `modules`.
"""
