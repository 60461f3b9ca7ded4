"""Snapshots: manifests, captures, packing and lineage."""
