"""bench: what this host does with real guests, for whoever installed it."""
