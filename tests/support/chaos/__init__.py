"""What befalls a run, its files and its input, at moments that can be chosen again: ``make chaos``."""
