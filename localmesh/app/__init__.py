"""Wiring: from configuration to running components, and the whole mesh on one machine."""
