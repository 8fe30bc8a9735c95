"""`python -m purchase` is `purchase`."""

from purchase.cli import entry

entry()
