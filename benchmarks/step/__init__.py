"""What does one optimizer step cost, next to other optimizers and to the memory's own speed?"""
