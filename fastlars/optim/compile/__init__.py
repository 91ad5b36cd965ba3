"""The step inside torch.compile: what is traced, and the operator that runs."""
