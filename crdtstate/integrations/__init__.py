"""
Front doors: what agents already speak, answered by a replica.

Each module is one door and needs the extra of its name, which nothing else imports:
`pip install 'crdtstate[mcp]'` for the MCP servers, `[langgraph]`, `[openai]`, `[claude]`.
"""
