"""What the Mosaic TPU backends of several ops share."""
