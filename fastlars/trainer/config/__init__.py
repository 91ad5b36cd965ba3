"""The settings of a run: command line, recipes, ranges, defaults."""
