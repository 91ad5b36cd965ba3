"""The run: one training loop, --find-lr and --dry-run."""
