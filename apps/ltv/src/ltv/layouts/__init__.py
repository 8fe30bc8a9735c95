"""How a log is laid out: one module a layout, with its declared columns and its feature catalogue.

A layout is a module with ``schema(days)``, which takes horizon -> days, and ``features()``, the full catalogue of
feature groups; its name in `LAYOUTS` is what ``data.layout`` says.
"""

from ltv.layouts import advertising, transactions

LAYOUTS = {"advertising": advertising, "transactions": transactions}
