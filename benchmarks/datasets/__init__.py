"""What to ask: prompts, output lengths and, for traces, when. The same options and seed give the same requests."""
