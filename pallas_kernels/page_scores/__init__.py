"""Upper bounds of the scores that queries can have with the keys of a page."""
