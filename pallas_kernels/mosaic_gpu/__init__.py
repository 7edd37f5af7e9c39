"""What the Mosaic GPU backends share: target checks, work lists, tiles and the attention kernels
themselves."""
