"""Tests of the daemon and its API."""
