"""Attention of a ragged chunk of many sequences against the sealed pages before each query."""
