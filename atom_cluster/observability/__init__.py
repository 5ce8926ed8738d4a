"""What the cluster records about itself: the table of metrics, where recordings go, and the logger's format."""
