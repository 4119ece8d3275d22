"""Benchmark of our server against LitServe and MLServer; see `__main__`."""
