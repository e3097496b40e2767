"""The process that is a replica: one gRPC endpoint and one engine with one model."""
