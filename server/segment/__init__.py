"""The straight line from bytes to mask."""
