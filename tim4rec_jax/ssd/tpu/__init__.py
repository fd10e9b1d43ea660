"""The SSD and the block around it as Pallas kernels for TPUs."""
