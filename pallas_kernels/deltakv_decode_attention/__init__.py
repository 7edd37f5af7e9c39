"""Attention of one query per row over listed pages of DeltaKV latents."""
