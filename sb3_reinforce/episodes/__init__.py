"""Whole episodes, numbered: the engine of REINFORCE. It knows no gradient, and nothing of the package above it."""
