"""Training of the models that sparsejax ships; run from a checkout."""
