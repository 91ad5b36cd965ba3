"""What surrounds the training: packages, signals, standard output, exit status, other processes."""
