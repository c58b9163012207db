"""Draws SVG pictures."""
