"""Where a model's bytes live: one file per kind of place."""
