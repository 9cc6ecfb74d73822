// Browsers as far as yjs and y-websocket are concerned: unmodified, in node. Commands come as lines
// of JSON, [number, method, ...arguments]; answers leave as [number, value].
import readline from 'node:readline'
import WebSocket from 'ws'
import { WebsocketProvider } from 'y-websocket'
import * as Y from 'yjs'

const clients = new Map()
const PATIENCE = 20000

const until = (check, subscribe) => new Promise((resolve, reject) => {
  const timer = setTimeout(() => reject(new Error(`not in time: ${check}`)), PATIENCE)
  const look = () => {
    let found
    try { found = check() } catch (error) { clearTimeout(timer); return reject(error) }
    if (found) { clearTimeout(timer); resolve(found) }
  }
  subscribe(look)
  look()
})

const content = (client) => ({
  map: client.doc.getMap('map').toJSON(),
  array: client.doc.getArray('array').toJSON(),
  text: client.doc.getText('text').toString()
})

const same = (one, two) => JSON.stringify(one) === JSON.stringify(two)
const sorted = (value) => {
  if (Array.isArray(value)) return value.map(sorted)
  if (value === null || typeof value !== 'object') return value
  return Object.fromEntries(Object.entries(value).sort(([a], [b]) => a < b ? -1 : 1).map(([k, v]) => [k, sorted(v)]))
}

const methods = {
  open (name, url, room, token, id) {
    const known = clients.get(name)
    const doc = known ? known.doc : new Y.Doc()
    if (id) doc.clientID = id
    const provider = new WebsocketProvider(url, room, doc, {
      WebSocketPolyfill: WebSocket,
      protocols: ['crdtstate', `crdtstate.token.${token}`],
      disableBc: true,
      maxBackoffTime: 200
    })
    const client = { doc, provider, closed: null }
    provider.on('closed', (event) => { client.closed = event })
    clients.set(name, client)
    return doc.clientID
  },
  synced: (name) => {
    const { provider } = clients.get(name)
    return until(() => provider.synced, (look) => provider.on('sync', look))
  },
  closed: (name) => {
    const client = clients.get(name)
    return until(() => client.closed, (look) => client.provider.on('closed', look))
  },
  disconnect: (name) => clients.get(name).provider.disconnect(),
  connect: (name) => clients.get(name).provider.connect(),
  destroy (name) { clients.get(name).provider.destroy() },
  // Runs a function of the client's doc and Y, given as text by the test.
  run: (name, code, ...values) =>
    new Function('doc', 'Y', 'awareness', 'values', code)(clients.get(name).doc, Y, clients.get(name).provider.awareness, values) ?? null,
  read: (name) => content(clients.get(name)),
  reads: (name, wanted) => {
    const client = clients.get(name)
    return until(() => same(sorted(content(client)), sorted(wanted)), (look) => client.doc.on('update', look))
      .catch((error) => { throw new Error(`${JSON.stringify(content(client))} is not ${JSON.stringify(wanted)}: ${error}`) })
  },
  // Waits until a function of the doc, given as text, says something true.
  until: (name, code) => {
    const { doc, provider } = clients.get(name)
    const check = new Function('doc', 'awareness', `return ${code}`)
    return until(() => check(doc, provider.awareness), (look) => {
      doc.on('update', look)
      provider.awareness.on('change', look)
    })
  },
  states: (name) => Object.fromEntries(clients.get(name).provider.awareness.getStates()),
  // What many clients have in common: each distinct content once.
  distinct: () => [...new Set([...clients.values()].map((client) => JSON.stringify(sorted(content(client)))))].map((text) => JSON.parse(text))
}

let last = Promise.resolve()
readline.createInterface({ input: process.stdin }).on('line', (line) => {
  const [number, method, ...args] = JSON.parse(line)
  last = last.then(async () => {
    let answer
    try {
      answer = [number, await methods[method](...args) ?? null]
    } catch (error) {
      answer = [number, null, String(error && error.stack || error)]
    }
    process.stdout.write(JSON.stringify(answer) + '\n')
  })
}).on('close', () => process.exit(0))
