"""A load generator for the API."""
