"""Back ends: measure and apply a rule over lists of tensors."""
