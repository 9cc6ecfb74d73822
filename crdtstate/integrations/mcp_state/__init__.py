"""
Shared state for any agent that speaks MCP: ``crdtstate mcp``.

`places` says how places are written and which of them an agent may touch, `digest` what changed
since a token (`tokens`), `claims` who works on what. `calls` does what agents ask over these,
`tools` says how they ask, and `server` serves it; these two need ``crdtstate[mcp]``.
"""
