"""Which implementation of an operator runs, and how it is loaded."""
