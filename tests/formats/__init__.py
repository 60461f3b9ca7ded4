"""Golden files: what was written once is read for ever."""
