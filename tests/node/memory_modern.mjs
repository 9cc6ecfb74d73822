// A client of the 2026 era (@modelcontextprotocol/client): uses the memory, listens for changes, and
// prints what it got as one line of JSON.
// Usage: memory_modern.mjs COMMAND ARGUMENT...
import { Client } from "@modelcontextprotocol/client";
import { StdioClientTransport } from "@modelcontextprotocol/client/stdio";

const [command, ...args] = process.argv.slice(2);
const client = new Client(
  { name: "new-client", version: "1.0.0" },
  { versionNegotiation: { mode: { pin: "2026-07-28" } } },
);
const told = new Promise((resolve) =>
  client.setNotificationHandler("notifications/resources/updated", (note) => resolve(note.params.uri)),
);
await client.connect(new StdioClientTransport({ command, args, env: process.env }));
const tools = (await client.listTools()).tools.map((tool) => tool.name);
const listening = await client.listen({ resourceSubscriptions: ["memory://knowledge-graph"] });
const made = await client.callTool({
  name: "create_entities",
  arguments: { entities: [{ name: "New", entityType: "client", observations: ["uses the SDK of 2026"] }] },
});
const found = await client.callTool({ name: "search_nodes", arguments: { query: "SDK OF 2026" } });
console.log(JSON.stringify({ tools, made, found, told: await told }));
await listening.close();
await client.close();
