"""Tests of `diapause.guest` without a guest."""
