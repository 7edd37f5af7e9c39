"""Stages of `scripts/gpu_suite.py`."""
