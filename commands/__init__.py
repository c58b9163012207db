"""What one may ask: command dataclasses, their handlers, and the bus that does all write-side I/O."""
