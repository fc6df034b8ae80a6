"""What a student is, as bits: which bit means what, and what a whole genome means.

`layout` names the slices of the flat boolean vector (masks, block connections, merge edges, bypass
edges, and by `kernels` and `ranks` the taps and ranks of layers); `resolve` repairs a genome into a
`Structure`; `canonical` sets bits without effect to True, so that a student has one genome;
`layout_file` writes `layout.json`.

May know: numpy alone; no torch, no pymoo, no network.
Begin with `layout.GenomeLayout`, then `resolve.resolve`.
"""
