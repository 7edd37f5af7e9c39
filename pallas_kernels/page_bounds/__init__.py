"""Bounds of the keys of whole pages: per channel the smallest and the largest."""
