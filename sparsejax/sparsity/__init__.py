"""Sparsity policies: which pages a step reads, as data of each row."""
