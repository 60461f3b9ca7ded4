"""The catalog: its versions, its journal, and what a failed commit leaves."""
