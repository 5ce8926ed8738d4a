"""What model families write around content: reasoning and tool calls, read as they stream. Knows no HTTP.

`dialect.py` chooses a model's formats, `answer.py` reads an output, the other files have one format or one tool each.
"""
