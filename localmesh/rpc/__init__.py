"""The gRPC edge: errors as statuses, servers, identities, channels, and the proxy that forwards bytes."""
