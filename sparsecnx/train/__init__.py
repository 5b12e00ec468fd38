"""Masked-autoencoder pretraining: recipe, data, checkpoints, the loop, and the picture of what was learned.

Needs the extra `[train]`; `errors` and `recipe` import without it.
"""
