"""The outside of the product, one file per thing, each implementing an interface of `domain.ports`."""
