"""The teacher: its task and weights, its graph read channel by channel, samples of its layers.

`tracing` flattens the network, `channel_flow` follows every channel through it (this is where an
operation or activation is made known, by `operations`), `graph` is the outcome; `blocks` makes the
genome's layout of it. Knows genome and data; no student, no search. Begin with `graph`.
"""
