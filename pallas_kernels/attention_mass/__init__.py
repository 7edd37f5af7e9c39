"""How much attention each listed page, or each of its tokens, receives."""
