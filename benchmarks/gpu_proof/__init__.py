"""`make gpu`: proves the package on the GPU that is here, stage by stage, and writes one page."""
