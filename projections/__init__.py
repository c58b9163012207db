"""Read models: what every question is answered from. Each file holds one: its tables, its handlers, its queries."""
