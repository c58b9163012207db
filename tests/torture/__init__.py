"""Workers that are killed and stopped again and again under load, and what must be true of their effects."""
