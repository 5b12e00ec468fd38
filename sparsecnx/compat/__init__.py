"""Other people's worlds: their APIs and their checkpoints, on what is here."""
