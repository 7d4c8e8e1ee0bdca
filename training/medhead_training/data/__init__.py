"""Training data: records, encoding, packing, stored features."""
