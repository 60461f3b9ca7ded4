"""The pager of a home, as its daemon sees it: start it, find it, ask it."""
