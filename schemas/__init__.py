"""The published language: codec, upcasters, generated JSON Schemas, the OpenAPI snapshot."""
