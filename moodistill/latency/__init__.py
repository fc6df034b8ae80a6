"""Latency in ONNX Runtime: models timed beside the teacher, in a process of its own.

`meter` starts the process and turns timings into a `Latency`; `worker` is that process; `simd`
finds the widths that pay on this device; `device` says which device it is.

May know: numpy, ONNX Runtime, `io`, `pareto`; no torch, whose threads would disturb the clock.
Begin with `meter.LatencyMeter`.
"""
