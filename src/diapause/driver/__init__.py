"""Drivers: one per VMM."""
