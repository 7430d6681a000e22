"""Workflows: one function per step of the loop; each takes settings and ids and returns a small JSON-able result."""
