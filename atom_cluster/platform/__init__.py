"""What hardware this process computes on."""
