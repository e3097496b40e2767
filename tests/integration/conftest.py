"""Integration tests take their etcd from ../conftest.py, as those of tests/faults do."""
