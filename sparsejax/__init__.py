"""sparsejax: a sparse-first LLM inference engine in JAX."""
