"""The supervisor of one node: drives replica processes to the set that the registry wants, and reports what it sees."""
