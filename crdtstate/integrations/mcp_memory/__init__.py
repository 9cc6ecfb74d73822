"""
A memory for assistants: ``crdtstate mcp-memory``, in the place of the MCP server
`@modelcontextprotocol/server-memory`.

The tools, their schemas, answers and errors are the same; what is behind them is a replicated
document instead of a file that each process rewrites. So any number of assistants share one memory,
on one host by naming one file, on several by naming a peer, and nothing that was answered is lost.

    graph    the knowledge graph as a document, and the index beside it
    tools    the nine tools
    jsonl    the file that people read, compare and commit
    memory   the graph in a shared file
    server   the memory as an MCP server; this alone needs ``crdtstate[mcp]``
"""
