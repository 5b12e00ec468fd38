"""Masked-autoencoder pretraining: recipe, data, checkpoints, the loop, and pictures of reconstructions.

Needs the extra `[train]`; `recipe` imports without it.
"""
