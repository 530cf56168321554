// The other tabs: GEMMs, saved values, memory and traffic, schedule, messages.

function table(headers, rows, extra = "") {
  return make(
    "div",
    { class: `card ${extra}` },
    make(
      "table",
      { class: "wide" },
      make(
        "thead",
        {},
        make(
          "tr",
          {},
          headers.map(h => make("th", { class: h.startsWith("#") ? "num" : null }, h.replace("#", ""))),
        ),
      ),
      make("tbody", {}, rows),
    ),
  );
}
function layersText(row) {
  if (!row.layers || row.layers.length < 2) return row.count > 1 ? `× ${count(row.count)}` : "";
  const runs = [];
  for (const n of [...row.layers].sort((a, b) => a - b)) {
    const last = runs[runs.length - 1];
    if (last && last[1] === n - 1) last[1] = n;
    else runs.push([n, n]);
  }
  return `× ${count(row.count)}, layers ${runs.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ")}`;
}
const tableRule = (data, number) => {
  const r = number === null || number === undefined ? null : data.tables.rules[number];
  return r
    ? make(
        "div",
        { class: "rule", title: r.because || null },
        make("span", { class: "mono" }, r.rule),
        make("span", { class: "dim mono" }, ` ${r.file}:${r.line}`),
      )
    : null;
};

function gemmTable(view) {
  const data = view.model.data;
  const filter = make("input", {
    type: "search",
    class: "filter",
    placeholder: "filter by module, role, format, rule",
    "aria-label": "filter GEMMs",
  });
  const cell = (which, g) =>
    !g
      ? make("td", {})
      : g.missing
        ? make("td", { class: "dim" }, `none: ${g.missing}`)
        : make(
            "td",
            {},
            [g.a, g.b].map((f, i) =>
              make("div", { class: "nowrap" }, make("span", { class: "dim mono" }, OPERANDS[which][i] + " "), badge(f)),
            ),
            make(
              "div",
              { class: "dim small nowrap" },
              `→ ${precisionName(g.out)}${g.promote_every ? `, promoted every ${g.promote_every}` : ""}`,
            ),
          );
  const rows = data.tables.uses
    .filter(u => Object.keys(u.gemms).length)
    .map(u => {
      const path = u.path.replace("*", u.layers.length ? u.layers[0] : "*");
      const numbers = [...new Set(Object.values(u.gemms).flatMap(g => g.rules || []))];
      const names = new Map(numbers.map(n => [data.tables.rules[n].rule, n]));
      const shape = u.shape ? u.shape.map(n => (n === null ? "?" : count(n))).join(" × ") : "";
      return make(
        "tr",
        {},
        make(
          "td",
          {},
          link(u.key, () => view.goTo(path), "show it in the graph"),
          make("div", { class: "dim small" }, [u.op, ...u.roles].join(" · ")),
          make("div", { class: "dim small" }, layersText(u)),
        ),
        make(
          "td",
          { class: "mono nowrap" },
          shape,
          u.experts > 1 ? make("div", { class: "dim small" }, `${u.experts} experts`) : null,
        ),
        ["fprop", "dgrad", "wgrad"].map(w => cell(w, u.gemms[w])),
        make(
          "td",
          {},
          u.cache.map(c =>
            make(
              "div",
              { class: "nowrap" },
              make("span", { class: "dim mono" }, c.value + " "),
              c.as === "off" ? "not as FP8" : badge(c.as),
            ),
          ),
        ),
        make(
          "td",
          {},
          [...names.values()].map(n => tableRule(data, n)),
        ),
      );
    });
  const body = table(["Module", "m × n × k", "fprop", "dgrad", "wgrad", "Kept for backward", "Rules"], rows);
  const texts = rows.map(r => r.textContent.toLowerCase());
  const none = make("p", { class: "dim", hidden: true }, "No GEMM matches.");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every(w => texts[i].includes(w));
      shown += !row.hidden;
    });
    none.hidden = shown > 0;
  });
  const t = data.tables.gemms;
  return [
    make("h2", {}, "GEMMs"),
    make(
      "p",
      { class: "dim" },
      Object.entries(t)
        .map(([k, g]) => `${k} ${count(g.fp8)} of ${count(g.total)} in FP8`)
        .join(" · ") + ". Identical layers share a row.",
    ),
    filter,
    body,
    none,
  ];
}

function savedTable(view) {
  const { tables } = view.model.data,
    has = tables.saved_bytes.bf16 !== null;
  const widest = Math.max(1, ...tables.layers.map(l => Math.max(l.bf16 || 0, l.fp8c)));
  const groups = [];
  for (const l of tables.layers) {
    const last = groups[groups.length - 1];
    if (last && l.layer !== null && last.bf16 === l.bf16 && last.fp8c === l.fp8c && last.last === l.layer - 1)
      last.last = l.layer;
    else groups.push({ ...l, first: l.layer, last: l.layer });
  }
  const bars = make("div", { class: "card bars" });
  for (const l of groups) {
    const bar = make(
      "div",
      { class: "bar" },
      has ? make("div", { class: "theirs", style: { width: `${(100 * l.bf16) / widest}%` } }) : null,
      make("div", { class: "ours", style: { width: `${(100 * l.fp8c) / widest}%` } }),
    );
    bars.append(
      make(
        "span",
        {},
        l.first === null
          ? "outside of layers"
          : l.first === l.last
            ? `layer ${l.first}`
            : `each of layers ${l.first}–${l.last}`,
      ),
      bar,
      make(
        "span",
        { class: "mono" },
        has
          ? `${bytes(l.bf16)} → ${bytes(l.fp8c)}${l.bf16 ? `  ${(l.fp8c / l.bf16).toFixed(3)}×` : ""}`
          : bytes(l.fp8c),
      ),
    );
  }
  const rows = tables.saved.map(s =>
    make(
      "tr",
      {},
      make(
        "td",
        {},
        s.path
          ? link(s.path, () => view.goTo(s.path.replace("*", s.layers.length ? s.layers[0] : "*")))
          : "outside of modules",
        make("div", { class: "dim small" }, layersText(s)),
      ),
      make(
        "td",
        { class: "mono" },
        s.type,
        s.is_logits ? make("span", { class: "dim" }, " output head's, not counted") : null,
      ),
      make("td", { class: "num" }, bytes(s.size_bytes)),
      make("td", { class: "num" }, bytes(s.size_bytes * s.count)),
      make("td", {}, s.why),
      make("td", {}, tableRule(view.model.data, s.rule)),
    ),
  );
  return [
    make("h2", {}, "Saved for backward"),
    make(
      "p",
      { class: "dim" },
      has
        ? make(
            "span",
            { class: "key" },
            make("i", { class: "theirs" }),
            "BF16, PyTorch's default min-cut ",
            make("i", { class: "ours" }),
            "fp8c",
          )
        : "fp8c; this build has no BF16 baseline",
    ),
    bars,
    table(["Value of", "Type", "#Each", "#Together", "Why", "Rule"], rows),
  ];
}

function budgetTable(view) {
  const { memory, traffic, flops } = view.model.data;
  const widest = Math.max(...memory.map(m => m.size_bytes), 1);
  const rows = memory.map(m =>
    make(
      "tr",
      {},
      make("td", {}, m.name),
      make("td", { class: "num" }, bytes(m.size_bytes)),
      make(
        "td",
        { class: "share" },
        make(
          "div",
          { class: "bar" },
          make("div", { class: "ours one", style: { width: `${(100 * m.size_bytes) / widest}%` } }),
        ),
      ),
      make("td", { class: "dim" }, m.note),
    ),
  );
  const halves = ["before forward", "after forward", "before backward", "after backward"];
  const most = Math.max(...traffic.flatMap(t => halves.map(h => t.moved_bytes[h] || 0)), 1);
  const cell = (t, h) =>
    make(
      "td",
      { class: "num" },
      t.moved_bytes[h] ? bytes(t.moved_bytes[h]) : "–",
      t.operators[h] ? make("div", { class: "dim small" }, `${count(t.operators[h])} operators`) : null,
      make("div", { class: "thin", style: { width: `${(100 * (t.moved_bytes[h] || 0)) / most}%` } }),
    );
  const sums = halves.map(h => traffic.reduce((n, t) => n + (t.moved_bytes[h] || 0), 0));
  const all = Object.values(flops).reduce((a, b) => a + b, 0);
  return [
    make("h2", {}, "Memory"),
    make("p", { class: "dim" }, "Of one device that holds the whole model; a mesh divides it."),
    table(["What", "#Bytes", "", "From"], rows),
    make("h2", {}, "Traffic"),
    make(
      "p",
      { class: "dim" },
      "Bytes the operators read and write, each counted on its own: fusion then saves part of it, on both sides.",
    ),
    table(
      ["Operators", ...halves.map(h => `#${h}`)],
      [
        ...traffic.map(t =>
          make(
            "tr",
            {},
            make("td", {}, t.family),
            halves.map(h => cell(t, h)),
          ),
        ),
        make(
          "tr",
          { class: "sum" },
          make("td", {}, "together"),
          sums.map(n => make("td", { class: "num" }, bytes(n))),
        ),
      ],
    ),
    make("h2", {}, "Arithmetic of the GEMMs"),
    table(
      ["Operands", "#FLOPs", "#Share"],
      Object.entries(flops).map(([k, n]) =>
        make(
          "tr",
          {},
          make("td", {}, badge(k)),
          make("td", { class: "num" }, n.toExponential(3)),
          make("td", { class: "num" }, `${((100 * n) / all).toFixed(1)} %`),
        ),
      ),
    ),
  ];
}

const LANE_LIMIT = 6000;
function scheduleTable(view) {
  const trace = view.model.data.schedule;
  if (!trace)
    return [
      make("h2", {}, "Schedule"),
      make(
        "p",
        { class: "dim" },
        "This build has no schedule: its step has no collectives, so there is nothing to overlap.",
      ),
    ];
  const parts = [
    make("h2", {}, "Schedule"),
    make(
      "p",
      { class: "dim" },
      "Compute and communication of each half on the two streams, in microseconds; the file is schedule.trace.json, which Perfetto opens.",
    ),
  ];
  const events = trace.traceEvents.filter(e => e.ph === "X" && e.dur > 0);
  const names = new Map(
    trace.traceEvents.filter(e => e.ph === "M" && e.name === "process_name").map(e => [e.pid, e.args.name]),
  );
  for (const [pid, name] of names) {
    const own = events.filter(e => e.pid === pid).sort((a, b) => b.dur - a.dur),
      shown = own.slice(0, LANE_LIMIT);
    const end = Math.max(...own.map(e => e.ts + e.dur), 1),
      width = 1100;
    const lanes = svg("svg", {
      viewBox: `0 0 ${width} 74`,
      class: "lanes",
      role: "img",
      "aria-label": `schedule of ${name}`,
    });
    for (const e of shown) {
      const rect = svg("rect", {
        x: (width * e.ts) / end,
        y: e.tid ? 40 : 6,
        width: Math.max(0.4, (width * e.dur) / end),
        height: 28,
        class: e.tid ? "comm" : "compute",
      });
      rect.append(svg("title", {}, `%${e.name}\n${e.ts} to ${(e.ts + e.dur).toFixed(3)} µs`));
      lanes.append(rect);
    }
    const figures = (trace.otherData || {})[name] || {};
    parts.push(
      make(
        "div",
        { class: "card" },
        make("h3", {}, name),
        make(
          "div",
          { class: "dim" },
          `${count(own.length)} operators in ${end.toFixed(1)} µs`,
          figures.lower_bound_us
            ? `; no schedule is shorter than ${figures.lower_bound_us.toFixed(1)} µs (${figures.method})`
            : "",
          own.length > shown.length ? `; the ${count(shown.length)} longest are drawn` : "",
        ),
        lanes,
        make("div", { class: "dim small" }, "above compute, below communication"),
      ),
    );
  }
  return parts;
}

function messageTable(view) {
  const { messages, tables } = view.model.data;
  return [
    make("h2", {}, "Messages"),
    messages.length
      ? make(
          "div",
          { class: "card" },
          messages.map(m => make("pre", { class: "message" }, m)),
        )
      : make("p", { class: "dim" }, "None."),
    make("h2", {}, "Beyond the graph"),
    table(
      ["Setting", "Value", "Rule"],
      tables.sections.map(s =>
        make(
          "tr",
          {},
          make("td", { class: "mono" }, s.name),
          make("td", { class: "mono" }, s.value),
          make("td", {}, tableRule(view.model.data, s.rule)),
        ),
      ),
    ),
    make("h2", {}, "Rules"),
    table(
      ["Rule", "Place", "Because"],
      [...new Map(tables.rules.map(r => [`${r.spec}.${r.rule}`, r]))].map(([key, r]) =>
        make(
          "tr",
          {},
          make("td", { class: "mono" }, key),
          make("td", { class: "mono" }, r.line ? `${r.file}:${r.line}` : r.file),
          make("td", {}, r.because || "–"),
        ),
      ),
    ),
  ];
}

const TABS = {
  graph: null,
  gemms: gemmTable,
  saved: savedTable,
  budget: budgetTable,
  schedule: scheduleTable,
  messages: messageTable,
};
