"""The teacher: its task and weights, its graph read channel by channel, samples of its layers.

`plain` makes a network ready; `tracing` flattens it, by `value_tracer` (`decompose` has operations
that are traced as simpler ones); `operations` lists what is understood (an operation or activation
is added there); `channel_flow` follows every channel through the graph, on top of `moves` and
`recorder`, which leaves whole what is not understood; `channel_groups` says which stay together;
`graph` is the result; `samples` are activations on calibration images; `blocks` makes the genome's
layout of all this.

May know: `genome`, `data`, `io`; no student, no search.
Begin with `graph.trace`, then `blocks.build_layout`.
"""
