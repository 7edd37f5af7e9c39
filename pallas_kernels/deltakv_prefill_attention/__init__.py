"""Attention of a ragged chunk of many sequences against the DeltaKV pages before each query."""
