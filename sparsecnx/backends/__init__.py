"""Choose the implementation that runs an operator, and load it."""
