"""Coded pages back in a floating dtype."""
