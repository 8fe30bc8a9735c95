"""User embeddings from event logs, trained for several tasks at once and scored against a baseline."""

__version__ = "1.0.0"
