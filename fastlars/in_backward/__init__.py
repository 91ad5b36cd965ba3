"""What may be done of a step during the backward pass, as soon as some gradients are complete."""
