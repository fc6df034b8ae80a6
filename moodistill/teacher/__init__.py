"""The teacher: its task and weights, its graph read channel by channel, samples of its layers.

`plain` makes a network ready, `tracing` flattens it (by `value_tracer`; `decompose` has operations
that are traced as simpler ones), `channel_flow` follows every channel through it (on top of
`moves` and `recorder`, which leaves whole what is not understood; an operation or activation is
made known in `operations`), `graph` is the outcome; `blocks` makes the
genome's layout of it. Knows genome and data; no student, no search. Begin with `graph`.
"""
