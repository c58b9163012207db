"""Ports kept in memory: for tests and for short-lived processes."""
