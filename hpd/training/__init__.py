"""A run: planned, trained, saved, resumed; alone or stage after stage."""
