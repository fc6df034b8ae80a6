"""From a genome to a network with weights, and from there to an `Evaluation`.

`builder` writes the network into a `draft`, step by step of the teacher: `layers` (a bypass bit
becomes a missing layer in `write_layer`), `channelwise`, `relabel` and `repeated` write one kind of
step each, with `partition`, `values` and `slicing` for the tensors; `inherit` walks it and `solve`s
its weights layer by layer, convolutions on whole `patches` by `regression`; `evaluator` builds,
inherits, exports, times and tests it; `context` holds what all students of a teacher share; `file`
writes a student to disk.

May know: `teacher`, `onnx`, `genome`, `data`, `pareto`; no pymoo, no run.
Begin with `evaluator.Evaluator.score`, then `builder.build_student`.
"""
