"""Benchmarks: workloads, contenders (each in its own process), measurement and reports."""
