"""How much attention each token receives from the last queries of its row."""
