// The status page: takes texts from the relay's stream (see crdtstate/relay/live.py) and shows them.
//
// What it shows was written by agents. It reaches the page through textContent and setAttribute of
// plain attributes only, never as markup; the policy the page is sent with would not have it either.
"use strict";

const SILENCE_MAX_MS = 15000; // The relay says something every five seconds.
const RETRY_MS = [500, 1000, 2000, 4000];
const GRAPH_MAX = 24; // More agents than this are shown as a grid.
const DENSE = 60; // More members than this are shown small.
const SVG = "http://www.w3.org/2000/svg";

const found = {}; // The sections of the page, as they came last.
let chosen = null; // The writer of the member that is looked at.
const at = (id) => document.getElementById(id);

// Words and numbers

const time = (ms) => new Date(ms).toLocaleTimeString([], { hourCycle: "h23" });
const moment = (ms) => new Date(ms).toLocaleString([], { hourCycle: "h23" });
const count = (number) => number.toLocaleString("en");
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

function bytes(number) {
  if (number === null || number === undefined) return "–";
  let unit = 0;
  for (; number >= 999.5 && unit < 4; unit++) number /= 1000;
  return `${unit && number < 9.95 ? number.toFixed(1) : Math.round(number)} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
}

function lag(member) {
  if (member.lag === undefined) return "–";
  if (!member.lag) return "0";
  const seconds = member.lag_seconds ? `, ${member.lag_seconds} s` : "";
  return `${count(member.lag)}${seconds}`;
}

function describe(member) {
  const parts = [member.self ? "this relay" : member.role, member.state];
  if (member.lag) parts.push(`${plural(member.lag, "change")} behind`);
  if (member.queued) parts.push(`${bytes(member.queued)} queued`);
  if (member.address) parts.push(member.address);
  return `${member.agent}: ${parts.join(", ")}`;
}

// Elements

function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function draw(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Bring the children of *parent* in line with *items*. Those that stay are the same elements, so
// nothing loses its focus, scroll position or selection for an update.
function list(parent, items, key, create, update) {
  const before = new Map(Array.from(parent.children, (child) => [child.dataset.key, child]));
  let next = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    let element = before.get(name);
    if (!element) {
      element = create(item);
      element.dataset.key = name;
    }
    before.delete(name);
    if (element === next) next = next.nextElementSibling;
    else parent.insertBefore(element, next);
    update(element, item);
  }
  for (const element of before.values()) element.remove();
}

function row(...columns) {
  return () => make("tr", {}, ...columns.map((name) => make("td", { class: name })));
}

function fill(element, texts) {
  texts.forEach((text, place) => put(element.children[place], text));
}

// Sections

const show = {
  relay(relay) {
    put(at("name"), relay.agent);
    put(at("health"), relay.why.length ? relay.why.join("; ") : "ready");
    at("health").dataset.state = relay.why.length ? "trouble" : "ready";
    at("unreachable").hidden = relay.unreachable.length === 0;
    put(at("unreachable"), `It cannot reach ${relay.unreachable.join("; ")}`);
    put(at("total-changes"), count(relay.changes));
    put(at("total-pending"), count(relay.pending));
    put(at("total-in"), bytes(relay.bytes_in));
    put(at("total-out"), bytes(relay.bytes_out));
    put(at("version"), relay.version);
    put(at("started"), moment(relay.started));
  },

  members(members) {
    const present = members.filter((member) => member.state !== "retired");
    const up = present.filter((member) => member.state === "up").length;
    put(at("total-up"), `${count(up)} of ${count(present.length)}`);
    at("total-up").classList.toggle("trouble", up < present.length);
    list(
      at("member-rows"),
      order(members),
      (member) => member.writer,
      row("theirs", "state", "soft", "number", "number"),
      (element, member) => {
        fill(element, [
          member.agent, member.state, member.self ? `${member.role}, this one` : member.role,
          lag(member), member.queued === undefined ? "–" : bytes(member.queued),
        ]);
        element.dataset.agent = member.agent;
        element.dataset.state = member.state;
        element.classList.toggle("chosen", member.writer === chosen);
      },
    );
    mesh(members);
  },

  documents({ rows, count: total }) {
    put(at("total-documents"), count(total));
    at("no-documents").hidden = total > 0;
    at("document-table").hidden = total === 0;
    more("more-documents", total - rows.length, "smaller document");
    list(
      at("document-rows"),
      rows,
      (document) => document.name,
      row("theirs", "number", "number", "number", "number"),
      (element, document) => {
        const sizes = [document.live, document.dead, document.journal].map(bytes);
        fill(element, [document.name, count(document.changes), ...sizes]);
        element.dataset.document = document.name;
      },
    );
  },

  conflicts({ rows, count: total }) {
    put(at("total-conflicts"), count(total));
    at("total-conflicts").classList.toggle("trouble", total > 0);
    at("no-conflicts").hidden = total > 0;
    more("more-conflicts", total - rows.length, "more conflict");
    list(
      at("conflict-rows"),
      rows,
      (conflict) => JSON.stringify([conflict.document, conflict.kind, conflict.name, conflict.key]),
      () => make("li", {}, make("p", { class: "place theirs" }), make("ul", { class: "candidates" })),
      (element, conflict) => {
        const place = [conflict.document, conflict.name];
        if (conflict.kind === "map") place.push(conflict.key);
        put(element.firstElementChild, place.join(" / "));
        candidates(element.lastElementChild, conflict);
      },
    );
  },

  events(events) {
    at("no-events").hidden = events.length > 0;
    list(
      at("event-rows"),
      events,
      (event) => String(event.id),
      (event) => {
        const what = make("span", {}, make("b", {}, event.what), make("span", { class: "theirs" }, event.text));
        return make("li", { "data-kind": event.kind }, make("time", { title: moment(event.at) }, time(event.at)), what);
      },
      () => {},
    );
  },
};

function candidates(parent, conflict) {
  const rows = conflict.candidates.map((each) => [each.value, `${each.agent}, ${time(each.at)}`]);
  if (conflict.more) rows.push([`and ${plural(conflict.more, "more value")}`, ""]);
  list(
    parent,
    rows.map((texts, place) => ({ texts, place })),
    ({ place }) => String(place),
    () => make("li", {}, make("span", { class: "value theirs" }), make("span", { class: "who theirs" })),
    (element, { texts }) => fill(element, texts),
  );
}

function more(id, number, noun) {
  at(id).hidden = number <= 0;
  put(at(id), `and ${plural(number, noun)}`);
}

// The mesh: agents on a circle and relays within, or all in a grid where they are many. It is one
// stop for the Tab key; the arrow keys lead from member to member.

const svg = draw("svg", { role: "listbox", "aria-label": "Members of the mesh", "aria-describedby": "about" });
const edges = draw("g", { "aria-hidden": "true" });
const nodes = draw("g", { role: "presentation" });
svg.append(edges, nodes);

const STATES = ["up", "suspected", "down", "retired"];

function mesh(members) {
  const width = Math.max(280, Math.floor(at("mesh").clientWidth));
  const ordered = order(members);
  const agents = ordered.filter((member) => member.role !== "relay");
  const isGraph = agents.length <= GRAPH_MAX && members.length - agents.length <= 8 && width > 420;
  const { places, height } = isGraph ? circle(ordered, agents, width) : grid(ordered, width);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.dataset.layout = isGraph ? "circle" : ordered.length > DENSE ? "dense" : "grid";
  const chosenNow = ordered.some((member) => member.writer === chosen);
  const stop = chosenNow ? chosen : ordered[0] && ordered[0].writer;
  list(nodes, ordered, (member) => member.writer, node, (element, member) => {
    place(element, member, places.get(member.writer), isGraph);
    element.setAttribute("tabindex", member.writer === stop ? "0" : "-1");
    element.setAttribute("aria-selected", String(member.writer === chosen));
  });
  link(isGraph ? ordered : [], places);
  const known = ordered.find((member) => member.writer === chosen);
  put(at("about"), known ? describe(known) : isGraph || !ordered.length ? "" : "Choose a member to see more of it.");
}

function order(members) {
  const rank = (member) =>
    member.self ? 0 : member.state === "retired" ? 3 : member.role === "relay" ? 1 : 2;
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  return [...members].sort(
    (a, b) => rank(a) - rank(b) || compare(a.agent, b.agent) || compare(a.writer, b.writer),
  );
}

function circle(ordered, agents, width) {
  const relays = ordered.filter((member) => member.role === "relay");
  // So large that the names of neighbours, on either side, do not touch.
  const roomy = Math.min(100 + 8 * agents.length, 165, width / 4);
  const radius = Math.max(roomy, 0.33 * agents.length ** 2);
  const height = 2 * radius + 70;
  const [x, y] = [width / 2, height / 2 - 4];
  const places = new Map();
  const around = (group, r, start) =>
    group.forEach((member, index) => {
      const angle = 2 * Math.PI * ((index + start) / group.length) - Math.PI / 2;
      const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
      places.set(member.writer, { x: x + r * cos, y: y + r * sin, side: cos < -0.01 ? -1 : cos > 0.01 ? 1 : 0, low: sin > 0 });
    });
  around(agents, radius, 0.5);
  around(relays, relays.length > 1 ? radius * 0.45 : 0, relays.length === 2 ? 0.5 : 0);
  relays.forEach((member) => Object.assign(places.get(member.writer), { side: 0, low: true }));
  return { places, height };
}

function grid(ordered, width) {
  const isDense = ordered.length > DENSE;
  const [cell, line] = isDense ? [130, 18] : [168, 24];
  const rows = Math.ceil(ordered.length / Math.max(1, Math.floor(width / cell)));
  const columns = Math.ceil(ordered.length / Math.max(1, rows));
  const places = new Map();
  ordered.forEach((member, index) => {
    const [column, row] = [Math.floor(index / rows), index % rows];
    const x = 12 + (column * width) / columns;
    places.set(member.writer, { x, y: 12 + row * line, side: 1, end: width / columns - 20, letter: isDense ? 6.5 : 7.1 });
  });
  return { places, height: rows * line + 6 };
}

function node(member) {
  const form = member.role === "relay" ? "rect" : "circle";
  return draw(
    "g", { class: "node", role: "option" },
    draw("title"), draw(form, { class: "halo" }), draw(form, { class: "shape" }),
    draw("path", { class: "mark" }), draw("text", { class: "label" }), draw("text", { class: "lag" }),
  );
}

function shape(element, half) {
  const size = { cx: 0, cy: 0, r: half, x: -half, y: -half, width: 2 * half, height: 2 * half, rx: half / 3 };
  const names = element.localName === "rect" ? ["x", "y", "width", "height", "rx"] : ["cx", "cy", "r"];
  for (const name of names) element.setAttribute(name, size[name]);
}

function place(element, member, { x, y, side, low, end, letter }, isGraph) {
  const [title, halo, body, mark, label, behind] = element.children;
  const half = isGraph ? (member.role === "relay" ? 13 : 9) : 6;
  element.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)})`);
  element.setAttribute("class", `node${member.writer === chosen ? " chosen" : ""}${member.self ? " self" : ""}`);
  element.setAttribute("aria-label", describe(member));
  element.dataset.state = member.state;
  element.dataset.agent = member.agent;
  put(title, describe(member));
  shape(halo, half + 4);
  shape(body, half);
  mark.setAttribute("d", `M${-half} ${-half}L${half} ${half}M${half} ${-half}L${-half} ${half}`);
  const [dx, dy] = side ? [side * (half + 6), 4] : [0, low ? half + 15 : -half - 7];
  const anchor = ["end", "middle", "start"][side + 1];
  const far = member.lag ? compact(member.lag) : "";
  if (isGraph) {
    lay(label, clip(member.agent, 22), dx, dy, anchor);
    lay(behind, far && `${far} behind`, dx, dy + 13, anchor);
  } else {
    const room = (end - dx) / letter - (far && far.length + 1.5);
    lay(label, clip(member.agent, Math.floor(room)), dx, dy, anchor);
    lay(behind, far && `−${far}`, end, dy, "end");
  }
}

function lay(element, text, x, y, anchor) {
  put(element, text);
  for (const [name, value] of Object.entries({ x, y, "text-anchor": anchor })) element.setAttribute(name, value);
}

function clip(text, length) {
  const letters = Array.from(text);
  return letters.length > length ? letters.slice(0, length - 1).join("") + "…" : text;
}

const compact = (number) => number.toLocaleString("en", { notation: "compact" });

function link(members, places) {
  // Those who are gone may still tell of links that they had.
  const here = members.filter((member) => member.state === "up" || member.state === "suspected");
  const writers = new Set(here.map((member) => member.writer));
  const pairs = new Map();
  for (const member of here) {
    for (const other of member.links) {
      if (writers.has(other)) pairs.set([member.writer, other].sort().join(" "), [member.writer, other]);
    }
  }
  list(edges, [...pairs.keys()], (key) => key, () => draw("line"), (element, key) => {
    const [from, to] = pairs.get(key).map((writer) => places.get(writer));
    const ends = { x1: from.x, y1: from.y, x2: to.x, y2: to.y };
    for (const [name, value] of Object.entries(ends)) element.setAttribute(name, value.toFixed(1));
    element.setAttribute("class", pairs.get(key).includes(chosen) ? "edge chosen" : "edge");
  });
}

function choose(element) {
  if (!element) return;
  chosen = element.dataset.key;
  show.members(found.members);
  element.focus();
}

// They listen on what holds the graph: listening for focus would make the graph itself a stop.
const holder = at("mesh");
holder.addEventListener("click", (event) => choose(event.target.closest(".node")));
holder.addEventListener("focusin", (event) => {
  const element = event.target.closest(".node");
  if (element && element.dataset.key !== chosen) choose(element);
});
holder.addEventListener("keydown", (event) => {
  const all = Array.from(nodes.children);
  const here = all.indexOf(event.target.closest(".node"));
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -here, End: all.length - 1 - here };
  if (here < 0 || !(event.key in steps)) return;
  event.preventDefault();
  choose(all[(here + steps[event.key] + all.length) % all.length]);
});

function legend() {
  for (const state of STATES) {
    const dot = draw("circle", { class: "shape", cx: 8, cy: 8, r: 5 });
    const mark = draw("path", { class: "mark", d: "M3 3L13 13M13 3L3 13" });
    const icon = draw("svg", { viewBox: "0 0 16 16", class: "node" }, dot, mark);
    at("legend").append(make("li", { "data-state": state }, icon, state));
  }
}

// The token: behind the # of the URL, which is sent to nobody. It is kept for this tab, so that the
// page can be loaded again, and taken off the URL, so that it is not shown, copied or remembered.

const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname);
}
// A URL with another token, opened in the same tab, loads nothing by itself.
addEventListener("hashchange", () => location.reload());

// The stream

const NOT_ADMITTED = 4401;

let failures = 0;
let silence = 0;
let newest = null;

function connect() {
  const url = new URL("live", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const stream = new WebSocket(url);
  const listen = () => {
    clearTimeout(silence);
    // Not `stream.close()`, which would wait for an answer: whoever is silent gives none.
    silence = setTimeout(() => lost(stream), SILENCE_MAX_MS);
  };
  listen();
  stream.onopen = () => stream.send(sessionStorage.getItem("token") ?? "");
  stream.onmessage = (message) => {
    listen();
    failures = 0;
    newest = Date.now();
    for (const [name, content] of Object.entries(JSON.parse(message.data))) {
      found[name] = content;
      if (name in show) show[name](content);
    }
    alive();
  };
  stream.onclose = (event) => lost(stream, event.code);
}

function alive() {
  at("link").dataset.state = "live";
  put(at("link-text"), "Live");
  if (!at("gone").hidden && found.relay) show.relay(found.relay);
  at("gone").hidden = true;
  at("main").classList.remove("gone");
  title();
}

function lost(stream, code) {
  stream.onopen = stream.onclose = stream.onmessage = null;
  stream.close();
  clearTimeout(silence);
  at("link").dataset.state = "gone";
  put(at("link-text"), "Not connected");
  put(at("health"), "unknown");
  at("health").dataset.state = "unknown";
  const what = newest === null ? "The relay does not answer." : `The relay is gone. This is how it was at ${time(newest)}.`;
  const locked = "This page needs the relay's token. Open the URL that crdtstate page prints.";
  put(at("gone"), code === NOT_ADMITTED ? locked : `${what} Trying again.`);
  at("gone").hidden = false;
  at("main").classList.add("gone");
  title();
  if (code === NOT_ADMITTED) {
    sessionStorage.removeItem("token");
    return;
  }
  const pause = RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)];
  setTimeout(connect, pause * (0.75 + Math.random() / 2));
}

function title() {
  const name = found.relay ? found.relay.agent : "relay";
  const isLive = at("link").dataset.state === "live";
  document.title = isLive ? `${name} · ${at("total-up").textContent} up` : `${name} · not connected`;
}

put(at("hint"), `Replica("agent-1", peers=["${location.origin.replace("http", "ws")}"])`);
at("mesh").append(svg);
legend();
new ResizeObserver(() => found.members && mesh(found.members)).observe(at("mesh"));
connect();
