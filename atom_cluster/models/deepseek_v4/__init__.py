"""DeepSeek-V4: attention to windows and compressed entries, hyper-connections, hash-routed experts."""
