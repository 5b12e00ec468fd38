"""The API of MinkowskiEngine, and the checkpoints of other libraries."""
