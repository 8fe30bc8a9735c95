"""Predict what a user will spend in 1, 7, 14 and 28 days."""
