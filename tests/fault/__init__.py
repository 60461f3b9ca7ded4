"""Tests in which something is killed, full or damaged."""
