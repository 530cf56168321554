// Search over modules and nodes of the shown graphs: words that all have to occur in path, operator, name, precision, role.

const RESULT_LIMIT = 60;

function searchIndex(view) {
  if (view.index.has(view.when)) return view.index.get(view.when);
  const modules = [],
    nodes = new Map();
  for (const m of view.model.byPath.values()) {
    if (!m.path || (m.fold && m !== m.fold.members[0])) continue;
    const inFold = foldedPath(m);
    if (inFold.isCopy) continue;
    const uses = (view.model.usesOf.get(m.path) || [])
      .map(
        u =>
          `${u.op} ${u.roles} ${u.kinds} ${u.fields
            .filter(f => /\.(x|w|dy)$/.test(f.name))
            .map(f => `${f.value} ${precisionName(f.value)}`)
            .join(" ")}`,
      )
      .join(" ");
    modules.push({ kind: "module", module: m, times: inFold.times, text: `module ${m.path} ${uses}`.toLowerCase() });
  }
  for (const half of view.model.halves.filter(h => h.when === view.when)) {
    for (let i = 0; i < half.size; i++) {
      if (!half.isDrawn(i)) continue;
      const { path, times } = foldedPath(half.modules[i]);
      const key = `${half.index}|${path}|${half.op[i]}|${half.precision[i]}|${half.gemm[i]}|${half.place[i]}`;
      const known = nodes.get(key);
      if (known) {
        known.count++;
        known.names.push(i);
        continue;
      }
      nodes.set(key, { kind: "node", half, node: i, times, count: 1, names: [i] });
    }
  }
  const found = [...modules, ...nodes.values()];
  for (const entry of nodes.values()) {
    const { half, node } = entry,
      use = half.useOf(node);
    entry.text =
      `${half.modules[node].path} ${half.opOf(node)} ${shortOp(half.opOf(node))} ${half.precisionOf(node)} ${precisionName(half.precisionOf(node))} ${GEMMS[half.gemm[node]]} ${use ? use.roles + " " + use.kinds : ""} ${half.direction} ${view.model.strings[half.place[node]]}`.toLowerCase();
  }
  view.index.set(view.when, found);
  return found;
}

/** The path with folded members' numbers replaced by `*`, how many modules that stands for, whether it is not the first. */
function foldedPath(module) {
  if (module.folded) return module.folded;
  let path = "",
    times = 1,
    isCopy = false;
  if (module.parent) {
    const above = foldedPath(module.parent);
    isCopy = above.isCopy || (module.fold !== null && module.fold.members[0] !== module);
    times = above.times * (module.fold ? module.fold.members.length : 1);
    path = `${above.path}.${module.fold ? `*${module.fold.id}` : module.name}`;
  }
  return (module.folded = { path, times, isCopy });
}

function findAll(view, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return { total: 0, shown: [] };
  const name = words.length === 1 ? words[0].replace(/^%/, "") : "";
  const byName = name
    ? view.model.halves
        .filter(h => h.when === view.when)
        .flatMap(h => {
          const i = h.find(name);
          return i === undefined ? [] : [{ kind: "node", half: h, node: i, times: 1, count: 1, names: [i] }];
        })
    : [];
  const found = [...byName, ...searchIndex(view).filter(e => words.every(w => e.text.includes(w)))];
  return { total: found.length, shown: found.slice(0, RESULT_LIMIT) };
}

function resultRow(view, entry, index) {
  const go = () => {
    view.closeSearch();
    entry.kind === "module"
      ? view.selectModule(entry.module, { reveal: true })
      : view.selectNode(entry.half.index, entry.node, { reveal: true });
  };
  const path = entry.kind === "module" ? entry.module.path : entry.half.modules[entry.node].path;
  const copies = entry.kind === "module" ? entry.times : entry.count;
  const half = view.model.half(view.when, "forward");
  return make(
    "div",
    { class: "result", role: "option", id: `result-${index}`, tabindex: "-1", onclick: go },
    entry.kind === "module"
      ? [make("span", { class: "what" }, "module"), moduleBadge(view, half, entry.module)]
      : [
          make("span", { class: "what mono" }, shortOp(entry.half.opOf(entry.node))),
          badge(entry.half.precisionOf(entry.node)),
          make("span", { class: "dim small" }, entry.half.direction),
        ],
    make("span", { class: "mono path" }, path || view.model.root.name),
    copies > 1 ? make("span", { class: "times" }, `× ${count(copies)}`) : null,
  );
}
