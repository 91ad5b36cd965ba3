"""The Triton back end: the same rules on any GPU, with kernels that are compiled at first use."""
