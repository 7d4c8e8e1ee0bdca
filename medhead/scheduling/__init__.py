"""How many nodes a tree gets: the cost of passes and the tree size that follows from it."""
