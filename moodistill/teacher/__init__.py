"""The teacher: its task and weights, its graph read channel by channel, samples of its layers.

`tracing` flattens the network; `operations` lists what is understood (an activation is added
there); `channel_flow` follows every channel through the graph; `channel_groups` says which stay
together; `graph` is the result; `samples` are activations on calibration images; `blocks` makes
the genome's layout of all this.

May know: `genome`, `data`, `io`; no student, no search.
Begin with `graph.trace`, then `blocks.build_layout`.
"""
