"""The guest side as the host sees it: images and the agent's link."""
