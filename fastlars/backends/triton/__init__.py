"""The Triton back end: the same rules on any GPU, compiled when they are first used."""
