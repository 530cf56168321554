// Which boxes a module holds, how they are joined, and where they lie. Layouts are made per module, inner ones first.

const BOX = { module: [196, 48], op: [196, 46], gemm: [232, 46], part: [196, 46], pill: [0, 20] };
const HEAD = 32,
  PAD = 12;
const LAYOUT_LIMIT = 600; // layouts kept

/** Items of a module in one half: child modules, folds, operators, parts (runs of loose operators), and input pills. */
function itemsOf(view, half, module) {
  const key = `${half.index}|${module.path}|${half.showsPlumbing}`;
  const known = view.items.get(key);
  if (known) return known;
  const items = new Map(),
    owner = new Map(); // owner: direct node -> item
  for (const child of module.children) {
    if (!child.counts[half.index]) continue;
    const fold = child.fold;
    const id = fold ? `fold:${fold.id}` : `module:${child.path}`;
    if (!items.has(id)) items.set(id, fold ? { id, kind: "fold", fold } : { id, kind: "module", module: child });
  }
  const drawn = module.nodes[half.index].filter(i => half.isDrawn(i));
  const parts = items.size && drawn.length > PART_LIMIT ? looseParts(half, module, drawn) : [];
  parts.forEach((nodes, k) => {
    const item = { id: `part:${module.path}#${k}`, kind: "part", nodes, half, module };
    items.set(item.id, item);
    for (const i of nodes) owner.set(i, item.id);
  });
  for (const i of drawn)
    if (!owner.has(i)) {
      items.set(`node:${i}`, { id: `node:${i}`, kind: "op", node: i, half });
      owner.set(i, `node:${i}`);
    }
  const itemOf = i => {
    let m = half.modules[i];
    if (m === module) return owner.get(i);
    while (m && m.parent !== module) m = m.parent;
    return m && (m.fold ? `fold:${m.fold.id}` : `module:${m.path}`);
  };
  const found = {
    items,
    ...joins(half, nodesBelow(module, half.index), itemOf, i => module.contains(half.modules[i])),
  };
  view.items.set(key, found);
  return found;
}

/** Items of a part: its operators. */
function itemsOfPart(part) {
  const inside = new Set(part.nodes);
  const items = new Map(part.nodes.map(i => [`node:${i}`, { id: `node:${i}`, kind: "op", node: i, half: part.half }]));
  return {
    items,
    ...joins(
      part.half,
      part.nodes,
      i => `node:${i}`,
      i => inside.has(i),
    ),
  };
}

function nodesBelow(module, half) {
  const found = module.nodes[half].slice();
  for (const child of module.children) if (child.counts[half]) for (const i of nodesBelow(child, half)) found.push(i);
  return found;
}

/** Edges between items, values read from outside (by item), and values with so many readers that edges are cut. */
function joins(half, nodes, itemOf, isInside) {
  const edges = new Map(),
    outside = new Map();
  for (const v of nodes) {
    if (!half.isDrawn(v)) continue;
    const to = itemOf(v);
    for (const u of half.sources[v]) {
      if (u < 0 || !isInside(u)) {
        if (!outside.has(u)) outside.set(u, new Set());
        outside.get(u).add(to);
        continue;
      }
      const from = itemOf(u);
      if (from === to || from === undefined) continue;
      const key = `${from}\n${to}`;
      const edge = edges.get(key);
      if (edge) edge.values.add(u);
      else edges.set(key, { from, to, values: new Set([u]) });
    }
  }
  const out = new Map();
  for (const e of edges.values()) out.set(e.from, (out.get(e.from) || 0) + 1);
  const cut = [];
  for (const [key, e] of edges)
    if (out.get(e.from) > FAN_OUT_LIMIT) {
      cut.push(e);
      edges.delete(key);
    }
  return { edges: [...edges.values()], outside, cut };
}

/** Runs of small operators joined to each other; GEMMs, attention and casts stay on their own. A run lies between the
 * same modules: what comes before a module and what comes after it are two runs. */
function looseParts(half, module, drawn) {
  const isLarge = op =>
    isGemmOp(op) || /attention|quantize|all_to_all|all_gather|all_reduce|reduce_scatter|exchange/.test(op);
  const small = new Set(drawn.filter(i => !isLarge(half.opOf(i)) && !half.gemm[i]));
  const group = new Map();
  const find = i => {
    while (group.get(i) !== i) {
      group.set(i, group.get(group.get(i)));
      i = group.get(i);
    }
    return i;
  };
  for (const i of small) group.set(i, i);
  const stage = stages(half, module, small);
  for (const i of small)
    for (const u of half.sources[i]) if (small.has(u) && stage[u] === stage[i]) group.set(find(i), find(u));
  const runs = new Map();
  for (const i of small) {
    const r = find(i);
    if (!runs.has(r)) runs.set(r, []);
    runs.get(r).push(i);
  }
  return [...runs.values()].filter(r => r.length > 3);
}

/** How many modules or large operators of this module lie before each node. What only small operators read counts with
 * the first of them. */
function stages(half, module, small) {
  const children = new Map(); // module below -> the child of `module` that holds it
  const own = i => {
    const m = half.modules[i];
    if (m === module) return small.has(i) ? null : i;
    if (!children.has(m)) children.set(m, childOf(module, m));
    return children.get(m);
  };
  const stage = new Int32Array(half.size).fill(-1),
    readers = new Map();
  const nodes = nodesBelow(module, half.index)
    .filter(i => half.isDrawn(i))
    .sort((a, b) => a - b);
  for (const i of nodes) {
    const mine = own(i);
    let most = 0;
    for (const u of half.sources[i]) {
      if (u < 0 || stage[u] < 0) continue;
      const theirs = own(u);
      most = Math.max(most, stage[u] + (theirs !== null && theirs !== mine ? 1 : 0));
      if (theirs !== null) continue;
      if (!readers.has(u)) readers.set(u, []);
      readers.get(u).push(i);
    }
    stage[i] = most;
  }
  for (const i of [...small].reverse()) {
    const after = readers.get(i) || [];
    if (after.length && after.every(r => small.has(r))) stage[i] = Math.min(...after.map(r => stage[r]));
  }
  return stage;
}

/** The child of `above` that holds a module. */
function childOf(above, module) {
  while (module.parent !== above) module = module.parent;
  return module;
}

/** A pill for a value read from outside. */
function pillOf(view, half, u) {
  if (u < 0) {
    const name = view.model.strings[-1 - u];
    const input = view.model.inputs.get(name);
    if (input)
      return {
        text: input.fqn
          ? input.fqn.split(".").slice(-2).join(".")
          : name.startsWith("tangents")
            ? "gradient of the loss"
            : `data ${name}`,
        kind: input.fqn ? "weight" : "data",
        type: input.type,
        name,
      };
    const forward = view.model.half(half.when, "forward");
    const at = forward.find(name) ?? forward.find(name.replace(/_[qs]$/, ""));
    const where = at === undefined ? name : forward.modules[at].name || shortOp(forward.opOf(at));
    const precision = at === undefined ? "" : forward.precisionOf(at);
    return {
      text: `${half.when === "after" ? "saved" : "forward"}: ${where}`,
      kind: "saved",
      name,
      at: at === undefined ? null : [forward.index, at],
      precision,
    };
  }
  const from = half.modules[u];
  const isLoose = from.children.some(child => child.counts[half.index]);
  return {
    text: `from ${isLoose || !from.name ? shortOp(half.opOf(u)) : from.name}`,
    kind: "from",
    name: half.nameOf(u),
    at: [half.index, u],
    precision: half.precisionOf(u),
    type: half.typeOf(u),
  };
}

const PILL_LIMIT = 7;
function pillsOf(view, half, found) {
  const merged = new Map();
  for (const [u, all] of found.outside) {
    const pill = pillOf(view, half, u);
    // Weights and saved values show where operators read them, not on every module around.
    const targets =
      pill.kind === "from" ? all : [...all].filter(id => id.startsWith("node:") || id.startsWith("part:"));
    if (!targets.length && pill.kind !== "from") continue;
    const key = `${pill.kind}|${pill.text}`;
    const known = merged.get(key);
    if (known) {
      for (const t of targets) known.targets.add(t);
      known.values.push(u);
    } else merged.set(key, { ...pill, targets: new Set(targets), values: [u] });
  }
  const pills = [...merged.values()];
  if (pills.length <= PILL_LIMIT) return pills;
  const rest = pills.splice(PILL_LIMIT - 1);
  const targets = new Set(rest.flatMap(p => [...p.targets]));
  const names = rest.map(p => p.text).join(", ");
  return [
    ...pills,
    { text: `${rest.length} more inputs`, kind: "more", name: names, targets, values: rest.flatMap(p => p.values) },
  ];
}

/** What an item's layout depends on: what is open inside it, and which members folds show. */
function layoutKey(view, half, item) {
  if (item.kind === "root")
    return `${half.index}|${half.showsPlumbing}|root|${[...view.open].sort().join(" ")}|${view.foldKey("")}`;
  const path = item.kind === "part" ? item.id.slice(5) : item.kind === "fold" ? item.fold.shown.path : item.module.path;
  const inside = [];
  for (const id of view.open)
    if (id.startsWith(path + ".", id.indexOf(":") + 1) || id.startsWith(`part:${path}#`)) inside.push(id);
  return `${half.index}|${half.showsPlumbing}|${item.id}|${path}|${inside.sort().join(" ")}|${view.foldKey(path)}`;
}

function layoutInside(view, half, item) {
  const key = layoutKey(view, half, item);
  const known = view.layouts.get(key);
  if (known) return known;
  if (view.layouts.size > LAYOUT_LIMIT) view.layouts.clear();
  const layout = newLayout(view, half, item);
  view.layouts.set(key, layout);
  return layout;
}

/** Boxes with x, y, width, height, and edge points, of what one item holds when it is open. */
function newLayout(view, half, item) {
  const isPart = item.kind === "part";
  const module = item.kind === "fold" ? item.fold.shown : item.module;
  const found = isPart ? itemsOfPart(item) : itemsOf(view, half, module);
  const upward = half.direction === "backward";
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: upward ? "BT" : "TB", nodesep: 14, ranksep: 24, marginx: 0, marginy: 0 });
  graph.setDefaultEdgeLabel(() => ({}));
  const boxes = new Map();
  for (const inner of found.items.values()) {
    const box = boxOf(view, half, inner);
    boxes.set(inner.id, box);
    graph.setNode(inner.id, { width: box.width, height: box.height });
  }
  const edges = [];
  for (const e of found.edges) {
    graph.setEdge(e.from, e.to);
    edges.push(e);
  }
  const pills = item.kind === "root" ? [] : pillsOf(view, half, found);
  for (const e of found.cut) {
    const source = found.items.get(e.from);
    const key = `cut:${e.from}`;
    pills.push({
      text: `↗ ${labelOf(view, half, source)}`,
      kind: "cut",
      name: labelOf(view, half, source),
      targets: new Set([e.to]),
      values: [...e.values],
      at: [half.index, [...e.values][0]],
      id: `${key}>${e.to}`,
    });
  }
  pills.forEach((pill, k) => {
    const id = pill.id || `pill:${k}`;
    const width = Math.min(240, 22 + 6.7 * pill.text.length);
    boxes.set(id, { item: { id, kind: "pill", pill, half }, width, height: BOX.pill[1], inside: null });
    graph.setNode(id, { width, height: BOX.pill[1] });
    for (const to of pill.targets) {
      graph.setEdge(id, to);
      edges.push({ from: id, to, values: new Set(pill.values) });
    }
  });
  dagre.layout(graph);
  let width = 0,
    height = 0;
  for (const [id, box] of boxes) {
    const at = graph.node(id);
    box.x = at.x - box.width / 2;
    box.y = at.y - box.height / 2;
    width = Math.max(width, at.x + box.width / 2);
    height = Math.max(height, at.y + box.height / 2);
  }
  for (const e of edges) e.points = graph.edge(e.from, e.to).points;
  return { boxes: [...boxes.values()], edges: edges.map(e => ({ ...e, points: e.points })), width, height };
}

function boxOf(view, half, item) {
  const isOpen = view.isOpen(item);
  if (!isOpen) {
    const [width, height] =
      BOX[
        item.kind === "fold"
          ? "module"
          : item.kind === "op" && half.precisionOf(item.node).includes("×")
            ? "gemm"
            : item.kind
      ];
    return { item, width, height: item.kind === "fold" ? height + 4 : height, inside: null };
  }
  const inside = layoutInside(view, half, item);
  const head = item.kind === "fold" ? HEAD + 26 : HEAD;
  return { item, inside, head, width: Math.max(210, inside.width + 2 * PAD), height: inside.height + head + PAD };
}

function labelOf(view, half, item) {
  if (item.kind === "module") return item.module.name;
  if (item.kind === "fold") return item.fold.label;
  if (item.kind === "part") return partLabel(item);
  return item.kind === "op" ? shortOp(half.opOf(item.node)) : item.pill.text;
}

/** Where a part's operators come from: the file most of them are of, and its lines. */
function placesOf(part) {
  const files = new Map();
  for (const i of part.nodes) {
    const [, file, line] = part.half.all.strings[part.half.place[i]].match(/^(.*):(\d+)$/) || [null, "", "0"];
    if (!files.has(file)) files.set(file, []);
    files.get(file).push(Number(line));
  }
  const [file, lines] = [...files].sort((a, b) => b[1].length - a[1].length)[0];
  return { file, first: Math.min(...lines), last: Math.max(...lines) };
}
function partLabel(part) {
  const { file, first, last } = placesOf(part);
  return file ? (first === last ? `line ${first}` : `lines ${first}–${last}`) : "operators";
}
