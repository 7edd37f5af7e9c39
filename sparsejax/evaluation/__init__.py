"""Honest evaluation of long-context quality against bytes."""
