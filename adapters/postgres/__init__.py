"""Ports kept in PostgreSQL."""
