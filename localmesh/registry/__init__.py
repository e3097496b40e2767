"""The registry: what operators want goes in here, and workers reach the mesh through it."""
