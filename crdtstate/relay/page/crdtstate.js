// Maps, counters, registers and sets of a crdtstate document, in a browser: read at once, written at
// once, acknowledged when a relay has them on disk. No dependencies, no build step.
//
//   import { connect } from "./crdtstate.js"
//   const plan = connect("plan", { token, url: "ws://127.0.0.1:8765", name: "ann" })
//   plan.addEventListener("change", () => show(plan.map("tasks").entries()))
//   await plan.map("tasks").set("write a test", "done")
//
// Writes return promises: kept once committed, rejected with Refused, or with Unsure when the relay
// was another one and cannot tell. Values are what JSON has, and bigint, Uint8Array, Date and Map.
// An int beyond 2^53 is a bigint. conflicts(...) gives what others wrote meanwhile: [[value, agent]...].

export class Refused extends Error {}
export class Unsure extends Error {}
export const connect = (document, options) => new Live(document, options)

const text = (bytes) => btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""))
const forms = {
  $int: (value) => BigInt(value),
  $bytes: (value) => Uint8Array.from(atob(value), (char) => char.charCodeAt(0)),
  $datetime: (value) => new Date(value),
  $float: (value) => ({ nan: NaN, inf: Infinity, "-inf": -Infinity })[value],
  $dict: (value) => new Map(value.map(([key, each]) => [decode(key), decode(each)])),
}
const dict = (pairs) => ({ $dict: Array.from(pairs, ([key, each]) => [encode(key), encode(each)]) })

export function encode(value) {
  if (typeof value === "bigint") return { $int: `${value}` }
  if (typeof value === "number" && !Number.isFinite(value)) {
    return { $float: Number.isNaN(value) ? "nan" : value > 0 ? "inf" : "-inf" }
  }
  if (value === null || ["string", "number", "boolean"].includes(typeof value)) return value
  if (value instanceof Uint8Array) return { $bytes: text(value) }
  if (value instanceof Date) return { $datetime: value.toISOString() }
  if (value instanceof Map) return dict(value)
  if (Array.isArray(value)) return value.map(encode)
  if (typeof value !== "object") throw new TypeError(`no value for a document: ${typeof value}`)
  const pairs = Object.entries(value)
  if (pairs.some(([key]) => key.startsWith("$"))) return dict(pairs)
  return Object.fromEntries(pairs.map(([key, each]) => [key, encode(each)]))
}

export function decode(found) {
  if (found === null || typeof found !== "object") return found
  if (Array.isArray(found)) return found.map(decode)
  const pairs = Object.entries(found)
  if (pairs.length === 1 && pairs[0][0] in forms) return forms[pairs[0][0]](pairs[0][1])
  return Object.fromEntries(pairs.map(([key, each]) => [key, decode(each)]))
}

const sum = (one, two) => {
  const exact = BigInt(one) + BigInt(two)
  return Number.isSafeInteger(Number(exact)) ? Number(exact) : exact
}
const random = () => text(crypto.getRandomValues(new Uint8Array(24))).replace(/[+/]/g, "_")

class Live extends EventTarget {
  #cells = new Map() // kind and name -> key, as JSON -> { key, value, conflicts }
  #pending = [] // writes that are not acknowledged: { write, seen, epoch, ops, resolve, reject }
  #written = 0
  #number = 0
  #epoch = ""
  #relay = null
  #tries = 0
  #session = random()
  #socket = null

  constructor(document, { token = "", url = location.origin, name = "" } = {}) {
    super()
    this.name = name
    this.state = "connecting" // then "live", and again; "closed" for good
    this.reason = ""
    this.url = `${url.replace(/^http/, "ws")}/lanes/${encodeURIComponent(document)}`
    this.protocols = ["crdtstate", `crdtstate.token.${token}`]
    this.#open()
  }

  map(name) {
    const read = (key) => this.#read("map", name, key)
    return {
      get: (key) => read(key)?.value,
      has: (key) => read(key) !== undefined,
      entries: () => this.#all("map", name).map(({ key, value }) => [key, value]),
      conflicts: (key) => read(key)?.conflicts ?? [],
      set: (key, value) => this.write([["put", name, key, encode(value)]]),
      delete: (key) => this.write([["remove", name, key]]),
    }
  }

  register(name) {
    const read = () => this.#read("register", name, null)
    return {
      get value() { return read()?.value },
      conflicts: () => read()?.conflicts ?? [],
      set: (value) => this.write([["set", name, encode(value)]]),
      clear: () => this.write([["clear", name]]),
    }
  }

  counter(name) {
    const read = () => this.#read("counter", name, null)
    const isWhole = (by) => typeof by === "bigint" || Number.isSafeInteger(by)
    const no = (by) => Promise.reject(new Refused(`counters count in whole numbers, not ${by}`))
    return {
      get value() { return read()?.value ?? 0 },
      add: (by = 1) => (isWhole(by) ? this.write([["count", name, encode(by)]]) : no(by)),
    }
  }

  set(name) {
    return {
      has: (value) => this.#read("set", name, value) !== undefined,
      values: () => this.#all("set", name).map(({ key }) => key),
      add: (value) => this.write([["add", name, encode(value)]]),
      delete: (value) => this.write([["discard", name, encode(value)]]),
    }
  }

  // Several operations in one change: seen as one everywhere.
  write(ops) {
    if (this.state === "closed") return Promise.reject(new Refused(this.reason || "closed"))
    if (JSON.stringify(ops).length > 250_000) return Promise.reject(new Refused("too large for one write"))
    return new Promise((resolve, reject) => {
      const pending = { write: ++this.#written, seen: this.#number, epoch: this.#epoch, ops, resolve, reject }
      this.#pending.push(pending)
      if (this.state === "live") this.#send(pending)
      this.#tell()
    })
  }

  get unacknowledged() { return this.#pending.length }

  // Ends it; what is not acknowledged is rejected.
  close() {
    if (this.state === "live") this.#socket.send(JSON.stringify({ bye: true }))
    this.#stop("closed")
    this.#socket?.close()
  }

  #open() {
    const socket = (this.#socket = new WebSocket(this.url, this.protocols))
    socket.onopen = () => {
      const last = this.#pending.at(-1)?.write ?? 0
      socket.send(JSON.stringify({ hello: { session: this.#session, name: this.name, relay: this.#relay, last } }))
    }
    socket.onmessage = ({ data }) => this.#hear(JSON.parse(data))
    socket.onclose = ({ code, reason }) => {
      if (this.state === "closed") return
      if (code >= 4400 && code < 4500) return this.#stop(reason || `refused: ${code}`)
      this.state = "connecting"
      this.#tell()
      setTimeout(() => this.state !== "closed" && this.#open(), Math.min(100 * 2 ** this.#tries++, 3000))
    }
  }

  #stop(reason) {
    this.state = "closed"
    this.reason = reason
    for (const { reject } of this.#pending.splice(0)) reject(new Unsure(reason))
    this.#tell()
  }

  #send({ write, seen, epoch, ops }) {
    // Numbers of another time say nothing now: what is here was seen.
    this.#socket.send(JSON.stringify({ write, seen: epoch === this.#epoch ? seen : this.#number, ops }))
  }

  #hear({ welcome, number, cells, acked, refused, reason }) {
    if (welcome) {
      this.#cells.clear()
      if (!this.#pending.length) this.#tries = 0
      ;[this.#relay, this.#epoch, this.#number] = [welcome.relay, welcome.epoch, welcome.number]
      this.#written = Math.max(this.#written, welcome.known)
    }
    for (const [kind, name, key, value, conflicts] of cells ?? []) this.#keep(kind, name, key, value, conflicts)
    this.#number = number ?? this.#number
    if (welcome) {
      this.state = "live"
      for (const pending of [...this.#pending]) {
        if (pending.write <= welcome.known || !welcome.unsure) this.#send(pending)
        else this.#settle(pending.write, new Unsure("another relay: it cannot tell whether that was written"))
      }
    }
    if (acked) {
      this.#tries = 0
      this.#settle(acked, null)
    }
    if (refused) this.#settle(refused, new Refused(reason))
    this.#tell()
  }

  #settle(write, error) {
    const at = this.#pending.findIndex((pending) => pending.write === write)
    if (at < 0) return
    const [{ resolve, reject }] = this.#pending.splice(at, 1)
    error ? reject(error) : resolve()
  }

  #tell() { this.dispatchEvent(new Event("change")) }

  #keep(kind, name, key, value, conflicts) {
    const view = `${kind} ${name}`
    if (!this.#cells.has(view)) this.#cells.set(view, new Map())
    const place = JSON.stringify(key)
    if (value === undefined || (kind === "set" && !value)) this.#cells.get(view).delete(place)
    else {
      const found = conflicts?.map(([each, agent]) => [decode(each), agent]) ?? []
      this.#cells.get(view).set(place, { key: kind === "set" ? decode(key) : key, value: decode(value), conflicts: found })
    }
  }

  // A view as it will be once all is written; keys as JSON.
  #view(kind, name) {
    const here = this.#cells.get(`${kind} ${name}`) ?? new Map()
    if (!this.#pending.length) return here
    const cells = new Map(here)
    const doing = { put: "map", remove: "map", set: "register", clear: "register", count: "counter", add: "set", discard: "set" }
    for (const [what, whose, ...rest] of this.#pending.flatMap(({ ops }) => ops)) {
      if (doing[what] !== kind || whose !== name) continue
      const place = JSON.stringify(kind === "register" || kind === "counter" ? null : rest[0])
      if (["remove", "clear", "discard"].includes(what)) cells.delete(place)
      else if (what === "count") cells.set(place, { value: sum(cells.get(place)?.value ?? 0, decode(rest[0])), conflicts: [] })
      else cells.set(place, { key: decode(rest[0]), value: decode(rest.at(-1)), conflicts: [] })
    }
    return cells
  }

  #read(kind, name, key) { return this.#view(kind, name).get(JSON.stringify(key === null ? null : encode(key))) }
  #all(kind, name) { return [...this.#view(kind, name).values()] }
}
