"""What is true and what may happen: aggregates, events, refusals, prices, ports."""
