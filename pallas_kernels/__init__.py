"""Array operations over paged KV pools: one folder per op, several implementations each, one dispatch."""
