"""What a verify pass costs, and how many nodes the next one has."""
