"""Command line tools. Nothing in the library imports them."""
