// The panel of a module, and of the whole step when nothing is selected.

function modulePanel(view, module) {
  const halves = ["forward", "backward"].map(d => view.model.half(view.when, d));
  const parts = [
    make("h2", {}, make("span", { class: "mono" }, module.path || view.model.root.name)),
    make(
      "div",
      { class: "crumbs" },
      module.parent
        ? link(module.parent.path || view.model.root.name, () => view.selectModule(module.parent, { reveal: true }))
        : "the whole step",
    ),
  ];
  const facts = make("dl", {});
  let parameters = 0,
    parameterBytes = 0,
    savedBytes = 0,
    savedCount = 0;
  for (const input of view.model.inputs.values())
    if (input.fqn && (module.path === "" || input.fqn.startsWith(module.path + "."))) {
      parameters++;
      parameterBytes += typeBytes(input.type);
    }
  const forward = view.model.half("after", "forward");
  for (const [i] of forward.savedBy)
    if (module.contains(forward.modules[i])) {
      savedCount++;
      savedBytes += forward.bytesOf(i);
    }
  facts.append(
    ...fact(
      "operators",
      halves.map(h => make("div", {}, `${h.direction} ${count(module.counts[h.index])}`)),
    ),
  );
  facts.append(
    ...fact(
      "precision",
      halves.map(h => make("div", {}, `${h.direction} `, moduleBadge(view, h, module))),
    ),
  );
  if (parameters)
    facts.append(
      ...fact("parameters", `${count(parameters)} tensor${parameters === 1 ? "" : "s"}, ${bytes(parameterBytes)}`),
    );
  if (savedCount)
    facts.append(
      ...fact("saved after", `${count(savedCount)} value${savedCount === 1 ? "" : "s"}, ${bytes(savedBytes)}`),
    );
  const place = halves.flatMap(h => module.nodes[h.index].map(i => view.model.strings[h.place[i]])).find(Boolean);
  if (module.fold)
    facts.append(
      ...fact(
        "identical",
        `${module.fold.members.length} modules, ${module.fold.members[0].path} to ${module.fold.members[module.fold.members.length - 1].path}`,
      ),
    );
  parts.push(facts, place ? sourceBlock(view, place, "") : null);
  const uses = [...view.model.uses.values()].filter(
    u => module.path === "" || u.path === module.path || u.path.startsWith(module.path + "."),
  );
  const own = uses.filter(u => u.path === module.path);
  if (own.length) parts.push(...own.map(u => useBlock(view, u)));
  const below = uses.filter(u => u.path !== module.path && ["linear", "grouped_mm"].includes(u.op));
  if (below.length) {
    const shown = below.slice(0, 40);
    parts.push(
      make("h3", {}, `${count(below.length)} GEMMs below`),
      make(
        "table",
        { class: "formats" },
        make(
          "tbody",
          {},
          shown.map(u => {
            const text = which =>
              (u.fields.find(f => f.name === which) || u.fields.find(f => f.name === "precision") || { value: "bf16" })
                .value;
            return make(
              "tr",
              {},
              make(
                "td",
                {},
                link(u.path.slice(module.path ? module.path.length + 1 : 0), () =>
                  view.selectModule(view.model.module(u.path), { reveal: true }),
                ),
              ),
              make("td", {}, badge(text("fprop.x")), " ", badge(text("fprop.w"))),
            );
          }),
        ),
      ),
      below.length > shown.length
        ? make("div", { class: "dim" }, `and ${count(below.length - shown.length)} more: search finds them`)
        : null,
    );
  }
  return parts;
}

const itemBytes = {
  f64: 8,
  i64: 8,
  f32: 4,
  i32: 4,
  bf16: 2,
  f16: 2,
  i16: 2,
  e4m3: 1,
  e5m2: 1,
  e8m0: 1,
  u8: 1,
  i8: 1,
  b8: 1,
};
const typeBytes = text => {
  const match = text.match(/^(\w+)\[([^\]]*)\]/);
  return match
    ? match[2]
        .split(",")
        .filter(s => s.trim())
        .reduce((n, s) => n * (Number(s) || 1), itemBytes[match[1]] || 0)
    : 0;
};

function drawPanel(view) {
  const panel = document.getElementById("panel");
  const s = view.selected;
  if (s && s.kind === "node")
    panel.replaceChildren(...nodePanel(view, view.model.halves[s.half], s.node).filter(Boolean));
  else if (s) panel.replaceChildren(...modulePanel(view, s.module).filter(Boolean));
  else panel.replaceChildren(...overview(view));
  panel.scrollTop = 0;
}

function overview(view) {
  const d = view.model.data,
    t = d.tables;
  const total = Object.values(t.gemms).reduce(
    (a, g) => ({ total: a.total + g.total, fp8: a.fp8 + g.fp8, kept: a.kept + g.kept }),
    { total: 0, fp8: 0, kept: 0 },
  );
  return [
    make("h2", {}, d.model.name),
    make(
      "div",
      { class: "crumbs" },
      make("code", {}, d.model.reference),
      " under ",
      make("code", {}, d.spec),
      " for ",
      make("code", {}, d.target.name),
      d.target.description ? ` (${d.target.description})` : "",
    ),
    make(
      "dl",
      {},
      fact(
        "GEMMs in FP8",
        make("b", {}, `${count(total.fp8)} of ${count(total.total)}`),
        make("div", { class: "dim small" }, `${count(total.kept)} kept as the spec says`),
      ),
      fact(
        "saved",
        make("b", {}, bytes(t.saved_bytes.fp8c)),
        make(
          "div",
          { class: "dim small" },
          t.saved_bytes.bf16 === null
            ? "no BF16 baseline in this build"
            : `BF16 keeps ${bytes(t.saved_bytes.bf16)}: ${(t.saved_bytes.fp8c / t.saved_bytes.bf16).toFixed(3)}×`,
        ),
      ),
      fact(
        "operators",
        ["before", "after"].map(when =>
          make(
            "div",
            {},
            `${when} ${["forward", "backward"].map(x => count(view.model.half(when, x).size)).join(" + ")}`,
          ),
        ),
      ),
    ),
    make("h3", {}, "Colours"),
    make(
      "div",
      { class: "legend" },
      Object.keys(PRECISION_NAMES)
        .filter(k => k !== "f16" && k !== "f64")
        .map(k =>
          make(
            "div",
            {},
            make("span", { class: `badge ${k}` }, PRECISION_NAMES[k]),
            make(
              "span",
              { class: "dim small" },
              {
                e4m3: "FP8, 3 mantissa bits",
                e5m2: "FP8, 2 mantissa bits",
                e5m6: "12 bits, kept for backward only",
                bf16: "as the model was written",
                f32: "sums, norms, router, scales",
                other: "indices and masks",
              }[k],
            ),
          ),
        ),
    ),
    make("h3", {}, "Keys"),
    make(
      "dl",
      { class: "keys" },
      [
        ["Enter", "unfold or fold the box"],
        ["↑ ↓ ← →", "go to another box; fold, unfold"],
        ["/", "search"],
        ["b", "before or after the rewrites"],
        ["Esc", "clear"],
      ].flatMap(([k, t]) => [make("dt", {}, make("kbd", {}, k)), make("dd", {}, t)]),
    ),
    make(
      "div",
      { class: "dim small foot" },
      Object.entries(d.versions)
        .map(([k, v]) => `${k} ${v}`)
        .join(" · "),
      make("div", { class: "mono" }, `plan ${d.plan.slice(0, 16)}`),
    ),
  ];
}
