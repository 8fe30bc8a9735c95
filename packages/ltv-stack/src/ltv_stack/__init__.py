"""Customer revenue at every horizon."""
