"""The router: picks, locks, forwards, loads on first request; one of the routers is the elected reconciler."""
