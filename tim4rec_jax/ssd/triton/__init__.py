"""The SSD and the block around it as Triton kernels for NVIDIA GPUs."""
