"""Errors, files and dtypes that several packages share. Imports nothing else of sparsecnx."""
