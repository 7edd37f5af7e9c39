"""Coding of whole pages: int8, fp8 or int4."""
