// A client of the 2025 era (@modelcontextprotocol/sdk), as today's assistants are: uses the memory,
// and prints what it got as one line of JSON.
// Usage: memory_legacy.mjs COMMAND ARGUMENT...
import { Client } from "@modelcontextprotocol/sdk/client/index.js";
import { StdioClientTransport } from "@modelcontextprotocol/sdk/client/stdio.js";
import { ResourceUpdatedNotificationSchema } from "@modelcontextprotocol/sdk/types.js";

const [command, ...args] = process.argv.slice(2);
const client = new Client({ name: "old-client", version: "1.0.0" });
const told = new Promise((resolve) =>
  client.setNotificationHandler(ResourceUpdatedNotificationSchema, (note) => resolve(note.params.uri)),
);
await client.connect(new StdioClientTransport({ command, args, env: process.env }));
const tools = (await client.listTools()).tools.map((tool) => tool.name);
await client.subscribeResource({ uri: "memory://knowledge-graph" });
const made = await client.callTool({
  name: "create_entities",
  arguments: { entities: [{ name: "Old", entityType: "client", observations: ["uses the SDK of 2025"] }] },
});
const found = await client.callTool({ name: "search_nodes", arguments: { query: "SDK OF 2025" } });
console.log(JSON.stringify({ tools, made, found, told: await told }));
await client.close();
