"""How weights of linear layers are stored."""
