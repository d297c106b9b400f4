"""Malformed input: recipes, data sets, tokenizers and checkpoints, each with the error that a user should
read."""
