"""Our server against the servers that people would otherwise use; see `__main__`."""
