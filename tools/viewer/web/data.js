// The page's data: unpacking, halves, the module tree. Column names are those of page_data.py.

const GEMMS = ["", "fprop", "dgrad", "wgrad"];
const OPERANDS = { fprop: ["x", "w"], dgrad: ["dy", "w"], wgrad: ["x", "dy"] };
const FAN_OUT_LIMIT = 8; // readers above which a value's edges become references
const PART_LIMIT = 10; // loose operators above which runs of them become one part

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

class Module {
  constructor(path, name, parent) {
    this.path = path;
    this.name = name;
    this.parent = parent;
    this.depth = parent ? parent.depth + 1 : 0;
    this.children = [];
    this.fold = null;
    this.nodes = [[], [], [], []]; // direct nodes of each half
    this.counts = [0, 0, 0, 0]; // nodes of the subtree that are drawn
    if (parent) parent.children.push(this);
  }
  contains(other) {
    while (other && other.depth > this.depth) other = other.parent;
    return other === this;
  }
}

/** Identical siblings shown as one box. `at` is the member whose inside is shown. */
class Fold {
  constructor(members) {
    this.members = members;
    this.at = 0;
    this.id = members[0].path;
    for (const m of members) m.fold = this;
  }
  get shown() {
    return this.members[this.at];
  }
  get label() {
    const last = this.members[this.members.length - 1];
    return `${this.shown.parent.name || "model"} ${this.members[0].name}–${last.name}`;
  }
}

/** One direction of one graph. Nodes are numbers; a negative input -1-s is a value from outside named by string s. */
class Half {
  constructor(index, columns, all) {
    Object.assign(this, columns);
    this.index = index;
    this.all = all;
    this.size = columns.op.length;
    this.plumbingOps = new Set(columns.plumbing);
    this.savedBy = new Map(columns.saved.map(([i, why, rule]) => [i, { why, rule }]));
    this.modules = columns.module.map(p => all.modules[p]);
    this.showsPlumbing = false;
    this._sources = null;
    this._readers = null;
    this._byName = null;
  }
  nameOf(i) {
    const n = this.number[i],
      base = this.all.strings[this.base[i]];
    return n < 0 ? base : `${base}_${n}`;
  }
  opOf(i) {
    return this.all.strings[this.op[i]];
  }
  typeOf(i) {
    return this.all.strings[this.type[i]];
  }
  bytesOf(i) {
    return this.all.bytes[this.type[i]];
  }
  precisionOf(i) {
    return this.all.strings[this.precision[i]];
  }
  useOf(i) {
    return this.all.uses.get(this.all.strings[this.use[i]]) || null;
  }
  isDrawn(i) {
    return this.showsPlumbing || !this.plumbingOps.has(this.op[i]);
  }
  argsOf(i) {
    let k = 0;
    return this.all.strings[this.args[i]].replace(/%/g, () => "%" + this.inputName(this.inputs[i][k++]));
  }
  inputName(n) {
    return n >= 0 ? this.nameOf(n) : this.all.strings[-1 - n];
  }
  find(name) {
    if (!this._byName) this._byName = new Map(Array.from({ length: this.size }, (_, i) => [this.nameOf(i), i]));
    return this._byName.get(name);
  }
  /** For each drawn node the drawn nodes and outside values it reads, views skipped. */
  get sources() {
    if (this._sources) return this._sources;
    const found = new Array(this.size);
    for (let i = 0; i < this.size; i++) {
      const into = new Set();
      for (const n of this.inputs[i]) {
        if (n < 0 || this.isDrawn(n)) into.add(n);
        else for (const deeper of found[n]) into.add(deeper);
      }
      found[i] = into;
    }
    return (this._sources = found);
  }
  get readers() {
    if (this._readers) return this._readers;
    const found = Array.from({ length: this.size }, () => []);
    for (let i = 0; i < this.size; i++) for (const n of new Set(this.inputs[i])) if (n >= 0) found[n].push(i);
    return (this._readers = found);
  }
  count() {
    for (const m of this.all.modules) m.counts[this.index] = 0;
    for (let i = 0; i < this.size; i++)
      if (this.isDrawn(i)) for (let m = this.modules[i]; m; m = m.parent) m.counts[this.index]++;
  }
}

class Model {
  constructor(data) {
    Object.assign(this, { strings: data.strings, bytes: data.bytes, data });
    this.byPath = new Map();
    this.root = this.module("");
    this.root.name = data.model.name;
    this.modules = data.paths.map(p => this.module(p));
    this.folds = data.folds.map(paths => new Fold(paths.map(p => this.modules[p])));
    for (const m of this.byPath.values()) if (!this.modules.includes(m)) this.modules.push(m);
    this.uses = new Map(data.uses.map(u => [u[0], use(u, data)]));
    this.usesOf = new Map();
    for (const u of this.uses.values()) {
      if (!this.usesOf.has(u.path)) this.usesOf.set(u.path, []);
      this.usesOf.get(u.path).push(u);
    }
    this.inputs = new Map(data.inputs.map(([name, fqn, type]) => [name, { name, fqn, type }]));
    this.halves = data.halves.map((columns, i) => new Half(i, columns, this));
    for (const half of this.halves) {
      half.modules.forEach((m, i) => m.nodes[half.index].push(i));
      half.count();
    }
    for (const m of this.byPath.values()) m.children.sort((a, b) => this.firstNode(a) - this.firstNode(b));
  }
  /** The module of a path, made with its ancestors when new. */
  module(path) {
    let found = this.byPath.get(path);
    if (!found) {
      const cut = path.lastIndexOf(".");
      const parent = path === "" ? null : this.module(cut < 0 ? "" : path.slice(0, cut));
      found = new Module(path, path.slice(cut + 1), parent);
      this.byPath.set(path, found);
    }
    return found;
  }
  firstNode(m) {
    let first = Infinity;
    for (const nodes of m.nodes) if (nodes.length) first = Math.min(first, nodes[0]);
    for (const child of m.children) first = Math.min(first, this.firstNode(child));
    return first;
  }
  half(when, direction) {
    return this.halves.find(h => h.when === when && h.direction === direction);
  }
  rule(number) {
    if (number < 0) return null;
    const [rule, spec, file, line, because] = this.data.rules[number];
    return { rule, spec, file, line, because };
  }
}

function use([key, path, op, kinds, roles, param, [m, n, k, experts], decisions, source, missing], data) {
  const fields = data.decisions[decisions].map(([name, value, rule, overrode]) => ({ name, value, rule, overrode }));
  return { key, path, op, kinds, roles, param, m, n, k, experts, fields, source, missing };
}

// --- words -----------------------------------------------------------------------------------------------------------

const numbers = new Intl.NumberFormat("en-US");
const count = n => numbers.format(n);
function bytes(n) {
  if (n === null || n === undefined) return "–";
  for (const [unit, size] of [
    ["TiB", 2 ** 40],
    ["GiB", 2 ** 30],
    ["MiB", 2 ** 20],
    ["KiB", 2 ** 10],
  ])
    if (n >= size) return (n / size).toFixed(n / size < 10 ? 2 : 1) + " " + unit;
  return n + " B";
}
const isGemmOp = op => /^fp8c\.scaled_|^aten\.(_grouped_)?(add|b|badd)?mm(\.|$)/.test(op);
const shortOp = op =>
  op
    .replace(/^(aten|fp8c|_c10d_functional|prims)\./, "")
    .replace(/\.(Tensor|Scalar|default|dim|int|dim_IntList|Tensor_Scalar|value|stable)$/, "");

/** The precision class of a text: `e4m3[1x128] fp32`, `e4m3 × e4m3`, `bf16`. */
function precisionClass(text) {
  const words = text
    .split(" × ")
    .map(w => (w.replace(/^fp/, "f").match(/^(e4m3|e5m2|e5m6|bf16|f16|f32|f64)/) || ["other"])[0]);
  return words.find(w => w.startsWith("e5") || w === "e4m3") || words[0];
}
const PRECISION_NAMES = {
  e4m3: "E4M3",
  e5m2: "E5M2",
  e5m6: "E5M6",
  bf16: "BF16",
  f16: "FP16",
  f32: "FP32",
  f64: "FP64",
  other: "no float",
};
const precisionName = text =>
  text
    .split(" × ")
    .map(w => {
      const group = (w.match(/\[([^\]]*)\]/) || [])[1];
      const name = PRECISION_NAMES[precisionClass(w)];
      return name === "no float" ? w || "–" : group ? `${name} ${group}` : name;
    })
    .join(" × ");
