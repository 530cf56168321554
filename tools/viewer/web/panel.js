// The panel of a node: formats, scales, bytes, rules, source line, and where else it appears.

const elementBits = { e4m3: 8, e5m2: 8, e5m6: 12, bf16: 16, fp16: 16, fp32: 32 };
function formatBytes(text, rows, cols) {
  const match = text.match(/^(\w+)(?:\[(?:(\d+)x(\d+)|(row|col|tensor))\] (\w+))?/);
  if (!match || !elementBits[match[1]] || rows === null || cols === null) return null;
  const data = Math.ceil((rows * cols * elementBits[match[1]]) / 8);
  if (!match[5]) return data;
  const whole = { row: [1, cols], col: [rows, 1], tensor: [rows, cols] }[match[4]] || [
    Number(match[2]),
    Number(match[3]),
  ];
  return data + Math.ceil(rows / whole[0]) * Math.ceil(cols / whole[1]) * (match[5] === "e8m0" ? 1 : 4);
}
function scaleText(text) {
  const match = text.match(/\[([^\]]*)\] (\w+)(.*)/);
  if (!match) return "";
  const each = { row: "row", col: "column", tensor: "tensor" }[match[1]] || `${match[1].replace("x", "×")} group`;
  const kind = { fp32: "an FP32 scale", pow2: "a power-of-two scale in FP32", e8m0: "an E8M0 scale" }[match[2]];
  return `${kind} for each ${each}${match[3]}`;
}
function operandSize(use, operand) {
  const known = { x: [use.m, use.k], w: [use.n === null ? null : use.n * use.experts, use.k], dy: [use.m, use.n] }[
    operand
  ];
  return known || [null, null];
}

const fact = (name, ...value) => [make("dt", {}, name), make("dd", {}, ...value)];

function ruleLine(view, number, extra) {
  const r = view.model.rule(number);
  if (!r) return null;
  return make(
    "div",
    { class: "rule" },
    make("span", { class: "mono" }, r.rule),
    make("span", { class: "dim mono" }, ` ${r.file}:${r.line}`),
    extra || null,
  );
}

function sourceBlock(view, place, full) {
  if (!place && !full) return null;
  const known = (view.model.data.sources[place] || [])[0];
  const where = known ? `${known[0]}:${place.replace(/.*:/, "")}` : full || place;
  return make(
    "div",
    { class: "source" },
    make("div", { class: "mono dim" }, where),
    known && known[1] ? make("code", {}, known[1]) : null,
  );
}

/** Formats of one use: a table of its GEMMs' operands with scale, bytes and rule. */
function useBlock(view, use) {
  const byName = new Map(use.fields.map(f => [f.name, f]));
  const precision = byName.get("precision");
  const block = make(
    "section",
    { class: "use" },
    make("h3", {}, make("span", { class: "mono" }, use.key)),
    make("div", { class: "dim" }, [use.op, use.roles, use.kinds].filter(Boolean).join(" · ")),
  );
  if (use.n !== null && use.k !== null) {
    const known = n => (n === null ? "?" : count(n));
    block.append(
      make(
        "div",
        { class: "dim" },
        `m × n × k = ${known(use.m)} × ${count(use.n)} × ${count(use.k)}${use.experts > 1 ? `, ${use.experts} experts` : ""}`,
      ),
    );
  }
  const seen = new Set();
  if (["linear", "grouped_mm"].includes(use.op)) {
    for (const [k, which] of ["fprop", "dgrad", "wgrad"].entries()) {
      if (k && use.missing[k - 1]) {
        block.append(
          make(
            "div",
            { class: "gemm-row" },
            make("b", {}, which),
            make("span", { class: "dim" }, ` none: ${use.missing[k - 1]}`),
          ),
        );
        continue;
      }
      const rows = OPERANDS[which].map(operand => {
        const field = byName.get(`${which}.${operand}`) || precision;
        const text = field ? field.value : "bf16";
        if (field) seen.add(field.rule);
        const [r, c] = operandSize(use, operand);
        const size = formatBytes(text, r, c),
          wide = formatBytes("bf16", r, c);
        return make(
          "tr",
          {},
          make("td", { class: "mono" }, operand),
          make("td", {}, badge(text), make("div", { class: "dim small" }, scaleText(text))),
          make(
            "td",
            { class: "num" },
            bytes(size),
            size !== null && size !== wide ? make("div", { class: "dim small" }, `BF16 ${bytes(wide)}`) : null,
          ),
          make(
            "td",
            {},
            field ? ruleLine(view, field.rule) : make("span", { class: "dim" }, "default"),
            field
              ? field.overrode.map(([v, r2]) =>
                  make("div", { class: "dim small" }, "over ", precisionName(v), " of ", view.model.rule(r2).rule),
                )
              : null,
          ),
        );
      });
      const out = (byName.get(`${which}.out`) || precision || { value: "bf16" }).value;
      const every = byName.get(`${which}.promote_every`);
      const accumulate = byName.get(`${which}.accumulate`);
      block.append(
        make(
          "table",
          { class: "formats" },
          make(
            "thead",
            {},
            make(
              "tr",
              {},
              make(
                "th",
                { colspan: "4" },
                which,
                make(
                  "span",
                  { class: "dim" },
                  ` → ${precisionName(out)}`,
                  accumulate ? `, sums in ${accumulate.value.toUpperCase()}` : "",
                  every && every.value !== "0" ? `, promoted every ${every.value}` : "",
                ),
              ),
            ),
          ),
          make("tbody", {}, rows),
        ),
      );
    }
  }
  const kept = use.fields.filter(f => /^(cache|recompute|retile)\./.test(f.name));
  if (kept.length)
    block.append(
      make(
        "table",
        { class: "formats" },
        make("thead", {}, make("tr", {}, make("th", { colspan: "3" }, "for backward"))),
        make(
          "tbody",
          {},
          kept.map(f => {
            const [kind, value] = f.name.split(".");
            seen.add(f.rule);
            const size = kind === "cache" ? formatBytes(f.value, ...operandSize(use, value)) : null;
            const what =
              kind === "recompute"
                ? make("span", { class: "badge quiet" }, "computed again")
                : kind === "cache"
                  ? f.value === "off"
                    ? make("span", { class: "dim" }, "not as FP8")
                    : badge(f.value)
                  : make("span", {}, `moved to ${f.value.replace("[", "").replace("]", " groups")}`);
            return make(
              "tr",
              {},
              make("td", { class: "mono" }, `${kind} ${value}`),
              make("td", {}, what, size ? make("span", { class: "dim small" }, ` ${bytes(size)}`) : null),
              make(
                "td",
                {},
                ruleLine(view, f.rule),
                f.overrode.map(([v, r2]) =>
                  make("div", { class: "dim small" }, "over ", precisionName(v), " of ", view.model.rule(r2).rule),
                ),
              ),
            );
          }),
        ),
      ),
    );
  const because = [...seen].map(n => view.model.rule(n)).filter(r => r && r.because);
  const texts = new Map(because.map(r => [r.rule, r.because]));
  for (const [rule, text] of texts)
    block.append(make("div", { class: "because" }, make("span", { class: "mono" }, rule), " because ", text));
  return block;
}

function link(text, action, title) {
  return make("button", { class: "link mono", title: title || null, onclick: action }, text);
}
const nodeLink = (view, half, i, text) =>
  link(
    text || `%${half.nameOf(i)}`,
    () => view.selectNode(half.index, i, { reveal: true }),
    `${half.direction}: ${half.opOf(i)}`,
  );

function nodePanel(view, half, i) {
  const module = half.modules[i],
    use = half.useOf(i),
    place = view.model.strings[half.place[i]];
  const parts = [
    make("h2", {}, make("span", { class: "mono" }, `%${half.nameOf(i)}`)),
    make(
      "div",
      { class: "crumbs" },
      `${half.when} the rewrites · ${half.direction} · `,
      link(module.path || view.model.root.name, () => view.selectModule(module, { reveal: true })),
    ),
    make("pre", { class: "line" }, `${half.opOf(i)}(${half.argsOf(i)})`),
  ];
  const facts = make(
    "dl",
    {},
    fact(
      "result",
      make("span", { class: "mono" }, half.typeOf(i)),
      half.bytesOf(i) ? ` ${bytes(half.bytesOf(i))}` : "",
    ),
    fact(
      "precision",
      half
        .precisionOf(i)
        .split(" × ")
        .map((t, k) => [k ? " × " : "", badge(t)]),
      scaleText(half.precisionOf(i).split(" × ")[0])
        ? make(
            "div",
            { class: "dim small" },
            half.precisionOf(i).split(" × ").map(scaleText).filter(Boolean).join("; "),
          )
        : null,
    ),
  );
  if (half.gemm[i]) facts.append(...fact("GEMM", GEMMS[half.gemm[i]]));
  const inputs = half.inputs[i].filter((n, k, all) => all.indexOf(n) === k);
  if (inputs.length)
    facts.append(
      ...fact(
        "reads",
        inputs
          .slice(0, 12)
          .map(n =>
            make(
              "div",
              {},
              n >= 0
                ? [nodeLink(view, half, n), make("span", { class: "dim mono small" }, ` ${half.typeOf(n)}`)]
                : outsideLink(view, half, n),
            ),
          ),
      ),
    );
  const readers = half.readers[i];
  if (readers.length)
    facts.append(
      ...fact(
        "read by",
        readers
          .slice(0, 12)
          .map(n =>
            make("div", {}, nodeLink(view, half, n), make("span", { class: "dim small" }, ` ${shortOp(half.opOf(n))}`)),
          ),
        readers.length > 12 ? make("div", { class: "dim" }, `and ${readers.length - 12} more`) : null,
      ),
    );
  const saved = [i, ...readers.filter(r => half.opOf(r) === "getitem")].filter(n => half.savedBy.has(n));
  if (saved.length)
    facts.append(
      ...fact(
        "saved",
        saved.map(n => {
          const { why, rule } = half.savedBy.get(n);
          return make(
            "div",
            {},
            make("span", { class: "mono" }, half.typeOf(n)),
            ` ${bytes(half.bytesOf(n))}`,
            why ? make("div", { class: "dim small" }, why) : null,
            ruleLine(view, rule),
            crossing(view, half, n),
          );
        }),
      ),
    );
  const twins = twinsOf(view, half, i);
  if (twins.length)
    facts.append(
      ...fact(
        half.when === "after" ? "before" : "after",
        twins
          .slice(0, 6)
          .map(([h, n]) =>
            make(
              "div",
              {},
              nodeLink(view, h, n),
              make("span", { class: "dim small" }, ` ${shortOp(h.opOf(n))} ${precisionName(h.precisionOf(n))}`),
            ),
          ),
      ),
    );
  const others = partnersOf(view, half, i);
  if (others.length)
    facts.append(
      ...fact(
        "same weight",
        others.map(([h, n]) =>
          make(
            "div",
            {},
            nodeLink(view, h, n),
            make(
              "span",
              { class: "dim small" },
              ` ${GEMMS[h.gemm[n]]}${h.direction === "backward" && h.gemm[n] === 1 ? " again" : ""}, ${h.direction}`,
            ),
          ),
        ),
      ),
    );
  parts.push(facts, sourceBlock(view, place, ""));
  if (use) parts.push(useBlock(view, use));
  return parts;
}

function outsideLink(view, half, n) {
  const name = half.inputName(n),
    input = view.model.inputs.get(name);
  if (input)
    return make(
      "span",
      { class: "mono" },
      input.fqn || `%${name}`,
      make("span", { class: "dim small" }, ` ${input.type}`),
    );
  const forward = view.model.half(half.when, "forward");
  const at = forward.find(name) ?? forward.find(name.replace(/_[qs]$/, ""));
  if (at === undefined) return make("span", { class: "mono" }, `%${name}`);
  return [
    link(`%${name}`, () => view.selectNode(forward.index, at, { reveal: true })),
    make("span", { class: "dim small" }, ` from forward, ${forward.modules[at].path}`),
  ];
}

function crossing(view, half, n) {
  const backward = view.model.half(half.when, "backward");
  const name = half.nameOf(n);
  const at = backward.inputs.findIndex(inputs => inputs.some(m => m < 0 && backward.inputName(m) === name));
  return at < 0 ? null : make("div", {}, "backward reads it in ", nodeLink(view, backward, at));
}

/** The node of the other graph: the same GEMM of the same use, or the node of the same name. */
function twinsOf(view, half, i) {
  const other = half.when === "after" ? "before" : "after";
  const halves = view.model.halves.filter(h => h.when === other);
  const isGemm = half.gemm[i] && isGemmOp(half.opOf(i));
  if (isGemm) {
    const key = view.model.strings[half.use[i]];
    return halves.flatMap(h =>
      gemmNodes(view, h, key)
        .filter(n => h.gemm[n] === half.gemm[i])
        .map(n => [h, n]),
    );
  }
  return halves.flatMap(h => {
    const n = h.find(half.nameOf(i));
    return n === undefined || h.opOf(n) !== half.opOf(i) ? [] : [[h, n]];
  });
}
function partnersOf(view, half, i) {
  if (!half.gemm[i] || !isGemmOp(half.opOf(i))) return [];
  const key = view.model.strings[half.use[i]];
  return view.model.halves
    .filter(h => h.when === half.when)
    .flatMap(h =>
      gemmNodes(view, h, key)
        .filter(n => !(h === half && n === i))
        .map(n => [h, n]),
    );
}
function gemmNodes(view, half, key) {
  if (!half.gemmsByUse) {
    half.gemmsByUse = new Map();
    for (let i = 0; i < half.size; i++)
      if (half.gemm[i] && isGemmOp(half.opOf(i))) {
        const use = view.model.strings[half.use[i]];
        if (!half.gemmsByUse.has(use)) half.gemmsByUse.set(use, []);
        half.gemmsByUse.get(use).push(i);
      }
  }
  return half.gemmsByUse.get(key) || [];
}
