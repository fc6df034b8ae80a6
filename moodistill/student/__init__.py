"""From a genome to a network with weights, and from there to an `Evaluation`.

`builder` writes the network (a bypass bit becomes a missing layer here), `inherit` solves its
weights from the teacher in closed form, `evaluator` exports, times and scores it. Knows no pymoo.
Begin with `builder`, then `evaluator`.
"""
