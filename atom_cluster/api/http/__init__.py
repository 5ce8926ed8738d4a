"""What holds for a request of any endpoint: its body, its id, its headers, its record, its errors."""
