"""Tests that boot real guests."""
