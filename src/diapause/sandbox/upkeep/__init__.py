"""Keeping a home in order: what takes space, what can go, what is damaged."""
