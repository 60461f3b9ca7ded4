"""The daemon: HTTP over a unix socket, and what keeps it single."""
