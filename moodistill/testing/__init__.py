"""What tests of this project and of its users need: the teacher with masks in place.

Students are compared with it. Begin with `masked`.
"""
