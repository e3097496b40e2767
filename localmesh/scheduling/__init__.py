"""Where replicas go, and what the reconciler does: state in, plan out. No I/O, no clock, no chance."""
