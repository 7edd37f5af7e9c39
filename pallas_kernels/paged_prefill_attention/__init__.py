"""Causal attention of a ragged chunk of many sequences against their pages."""
