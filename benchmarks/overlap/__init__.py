"""What is gained by stepping while the backward pass and the all-reduce still run?"""
