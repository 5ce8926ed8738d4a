"""The engine core: scheduler, block tables and step loop. No Ray, no HTTP, and no torch but in `local_runner`."""
