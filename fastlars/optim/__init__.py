"""Optimizers: thin subclasses of torch.optim.Optimizer over the back ends."""
