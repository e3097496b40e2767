"""localmesh: models on the machines you own, as one gRPC mesh."""

__version__ = "0.1.0"
