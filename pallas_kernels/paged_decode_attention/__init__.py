"""Attention of one query per sequence against its listed pages."""
