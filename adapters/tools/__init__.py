"""What agents can do besides talking: one file per tool."""
