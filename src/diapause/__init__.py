"""Diapause: pause, snapshot, fork and resume the microVMs that AI agents run in."""

__version__ = "0.1.0"
