"""Model definitions, and the registry that loads them."""
