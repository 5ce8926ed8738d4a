"""From a checked request to the last byte of its answer, whatever API it came by."""
