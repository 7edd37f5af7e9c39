"""Writes of new keys and values into paged pools."""
