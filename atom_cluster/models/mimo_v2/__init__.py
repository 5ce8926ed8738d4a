"""MiMo-V2-Flash: layers with windows and sinks, experts, and three layers that draft."""
