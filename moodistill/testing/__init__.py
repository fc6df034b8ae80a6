"""For tests of this project and of its users: the teacher with masks in place.

A student's logits must equal those of the masked teacher.

May know: `teacher`, `genome`. Begin with `masked`.
"""
