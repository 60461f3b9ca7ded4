"""Sandboxes: their states, their journal and the verbs that move them."""
