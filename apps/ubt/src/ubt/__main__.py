"""`python -m ubt` is `ubt`; several training processes start each other by it."""

from ubt.cli import entry

entry()
