"""Who may do what, and how much of it, before a request's body is read."""
