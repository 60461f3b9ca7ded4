"""The pager: the two processes, and how its daemon asks them."""
