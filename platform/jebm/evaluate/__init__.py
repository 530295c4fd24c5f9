"""Measures of a trained model: how likely, how well sampled, how good its pictures."""
