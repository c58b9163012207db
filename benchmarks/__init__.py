"""Measured ratios: the product beside a floor or a peer in the same run. How to read them: benchmarks/README.md."""
