"""What a student is, as bits: the genome's layout, and what a genome means.

`layout` says which bit is which channel, connection or edge (`kernels` and `ranks` say what the
bits of these two mean); `resolve` repairs a genome into a `Structure`; `canonical` sets bits
without effect to True, so that a student has one genome.
Knows numpy alone: no torch, no pymoo. Begin with `layout`.
"""
