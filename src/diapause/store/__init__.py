"""The local store: where every file of a home lies, and how a blob is written once."""
