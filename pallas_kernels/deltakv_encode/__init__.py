"""Coding of whole pages as DeltaKV latents."""
