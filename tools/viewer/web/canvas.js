// The graph's boxes on the page. Names come from user code: every text goes through textContent, never through HTML.

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") element.className = value;
    else if (key === "style") Object.assign(element.style, value);
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat(3))
    if (child !== null && child !== undefined && child !== "" && child !== false) element.append(child);
  return element;
}
const SVG = "http://www.w3.org/2000/svg";
function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  element.append(...children);
  return element;
}
const badge = (text, extra = "") =>
  make("span", { class: `badge ${precisionClass(text)} ${extra}` }, precisionName(text));

/** What a module computes in: its GEMMs' formats, or the dtype most of its operators have. */
function modulePrecision(view, half, module) {
  const key = `${half.index}|${module.path}`;
  let found = view.precisions.get(key);
  if (!found) {
    const formats = new Map(),
      dtypes = new Map();
    let fp8 = 0,
      gemms = 0;
    for (const i of nodesBelow(module, half.index)) {
      const text = half.precisionOf(i);
      if (half.gemm[i] && isGemmOp(half.opOf(i))) {
        gemms++;
        if (text.includes("×")) fp8++;
        formats.set(text, (formats.get(text) || 0) + 1);
      } else if (half.isDrawn(i) && precisionClass(text) !== "other") dtypes.set(text, (dtypes.get(text) || 0) + 1);
    }
    const most = m => ([...m].sort((a, b) => b[1] - a[1])[0] || [""])[0];
    found = { fp8, gemms, text: gemms ? most(formats) : most(dtypes) };
    view.precisions.set(key, found);
  }
  return found;
}

function moduleBadge(view, half, module) {
  const { fp8, gemms, text } = modulePrecision(view, half, module);
  if (!gemms) return badge(text, "quiet");
  const name = fp8
    ? fp8 === gemms
      ? "FP8"
      : `FP8 ${count(fp8)}/${count(gemms)}`
    : PRECISION_NAMES[precisionClass(text)];
  return make(
    "span",
    { class: `badge ${precisionClass(text)}`, title: fp8 ? `${fp8} of ${gemms} GEMMs read FP8` : `${gemms} GEMMs` },
    name,
  );
}

function colourOf(view, half, item) {
  if (item.kind === "op") return precisionClass(half.precisionOf(item.node));
  if (item.kind === "part") return "part";
  if (item.kind === "pill")
    return item.pill.kind === "weight" || !item.pill.precision ? "plain" : precisionClass(item.pill.precision);
  const { fp8, gemms, text } = modulePrecision(view, half, item.kind === "fold" ? item.fold.shown : item.module);
  return gemms && fp8 && fp8 < gemms ? "mixed e4m3" : precisionClass(text);
}

function drawInside(view, half, layout, offset) {
  const lines = svg("svg", {
    class: "edges",
    width: layout.width + 8,
    height: layout.height + 8,
    "aria-hidden": "true",
  });
  for (const edge of layout.edges) {
    const value = [...edge.values][0];
    const kind = value >= 0 ? valueClass(half, value) : "plain";
    const path = svg("path", { d: curve(edge.points), class: `edge ${kind}${edge.values.size > 1 ? " many" : ""}` });
    const types = [...edge.values]
      .slice(0, 4)
      .map(u => (u >= 0 ? `%${half.nameOf(u)} : ${half.typeOf(u)}` : `%${half.inputName(u)}`));
    path.append(
      svg("title", {}, types.join("\n") + (edge.values.size > 4 ? `\nand ${edge.values.size - 4} more` : "")),
    );
    lines.append(path);
  }
  const place = make(
    "div",
    {
      class: "inside",
      style: { left: offset.x + "px", top: offset.y + "px", width: layout.width + "px", height: layout.height + "px" },
    },
    lines,
  );
  const upward = half.direction === "backward";
  const boxes = [...layout.boxes].sort((a, b) => (upward ? b.y - a.y : a.y - b.y) || a.x - b.x);
  for (const box of boxes) place.append(drawBox(view, half, box));
  return place;
}

/** The class of the value an operator gives: a GEMM's result has a dtype of its own. */
const valueClass = (half, i) =>
  precisionClass(/quantize/.test(half.opOf(i)) ? half.precisionOf(i) : half.typeOf(i).replace(/^\(/, ""));

function curve(points) {
  const at = p => `${p.x.toFixed(1)} ${p.y.toFixed(1)}`;
  if (points.length < 3) return `M${points.map(at).join("L")}`;
  let d = `M${at(points[0])}`;
  for (let i = 1; i < points.length - 2; i++)
    d += `Q${at(points[i])} ${at({ x: (points[i].x + points[i + 1].x) / 2, y: (points[i].y + points[i + 1].y) / 2 })}`;
  return d + `Q${at(points[points.length - 2])} ${at(points[points.length - 1])}`;
}

function drawBox(view, half, box) {
  const { item } = box;
  const style = { left: box.x + "px", top: box.y + "px", width: box.width + "px", height: box.height + "px" };
  if (item.kind === "pill") return drawPill(view, half, item.pill, style);
  const open = box.inside !== null;
  const module = item.kind === "fold" ? item.fold.shown : item.kind === "module" ? item.module : null;
  const classes = [
    "box",
    item.kind,
    colourOf(view, half, item),
    open ? "open" : "",
    view.isSelected(half, item) ? "selected" : "",
    view.isLinked(half, item) ? "linked" : "",
  ];
  const element = make("div", {
    class: classes.filter(Boolean).join(" "),
    style,
    tabindex: "0",
    role: "treeitem",
    "aria-level": module ? module.depth : null,
    "aria-expanded": item.kind === "op" ? null : String(open),
    "data-id": item.id,
    "data-half": half.index,
    "data-path": module ? module.path : null,
    "data-node": item.kind === "op" ? half.nameOf(item.node) : null,
  });
  element.setAttribute("aria-label", nameForScreenReader(view, half, item));
  const head = make("div", { class: "head" });
  if (item.kind === "op") {
    const saved = half.savedBy.has(item.node) || savedThroughView(half, item.node);
    head.append(
      make(
        "div",
        { class: "title" },
        make("span", { class: "name" }, shortOp(half.opOf(item.node))),
        half.gemm[item.node] && isGemmOp(half.opOf(item.node))
          ? make("span", { class: "gemm" }, GEMMS[half.gemm[item.node]])
          : null,
        saved ? make("span", { class: "saved", title: "crosses to backward" }, "saved") : null,
      ),
      make(
        "div",
        { class: "sub" },
        badge(half.precisionOf(item.node)),
        half.precisionOf(item.node).includes("×")
          ? null
          : make("span", { class: "type" }, sizes(half.typeOf(item.node))),
      ),
    );
  } else {
    const name = labelOf(view, half, item);
    const operators = item.kind === "part" ? item.nodes.length : module.counts[half.index];
    head.append(
      make(
        "div",
        { class: "title" },
        make("span", { class: "chevron", "aria-hidden": "true" }, open ? "▾" : "▸"),
        make("span", { class: "name" }, name),
        item.kind === "fold" ? make("span", { class: "times" }, `× ${item.fold.members.length}`) : null,
        open && module ? moduleBadge(view, half, module) : null,
      ),
    );
    if (!open)
      head.append(
        make(
          "div",
          { class: "sub" },
          module ? moduleBadge(view, half, module) : null,
          make(
            "span",
            { class: "type" },
            `${count(operators)} op${operators === 1 ? "" : "s"}${item.kind === "fold" ? " each" : module ? "" : ` of ${placesOf(item).file}`}`,
          ),
        ),
      );
  }
  element.append(head);
  if (open && item.kind === "fold") element.append(drawStepper(view, item.fold));
  if (open) element.append(drawInside(view, half, box.inside, { x: (box.width - box.inside.width) / 2, y: box.head }));
  return element;
}

/** A quantize's results are `getitem`s, which are not drawn: what they are saved as shows on the operator. */
function savedThroughView(half, i) {
  return half.readers[i].some(r => !half.isDrawn(r) && half.opOf(r) === "getitem" && half.savedBy.has(r));
}

const sizes = type => {
  const first = type.match(/\[([^\]]*)\]/);
  return first ? first[1].replace(/, /g, "×") || "scalar" : "";
};

function nameForScreenReader(view, half, item) {
  if (item.kind === "op")
    return `${half.opOf(item.node)} ${half.nameOf(item.node)}, ${precisionName(half.precisionOf(item.node))}`;
  if (item.kind === "part") return `${item.nodes.length} operators of ${labelOf(view, half, item)}`;
  const module = item.kind === "fold" ? item.fold.shown : item.module;
  const { fp8, gemms } = modulePrecision(view, half, module);
  return `${module.path}${item.kind === "fold" ? `, one of ${item.fold.members.length} identical` : ""}, ${gemms ? `${fp8} of ${gemms} GEMMs in FP8` : "no GEMMs"}`;
}

function drawStepper(view, fold) {
  const step = by => event => {
    event.stopPropagation();
    view.showMember(fold, (fold.at + by + fold.members.length) % fold.members.length);
  };
  return make(
    "div",
    { class: "stepper" },
    make("button", { "aria-label": "previous of the identical ones", onclick: step(-1) }, "‹"),
    make("span", {}, `${fold.shown.name}: ${fold.at + 1} of ${fold.members.length} identical`),
    make("button", { "aria-label": "next of the identical ones", onclick: step(1) }, "›"),
  );
}

function drawPill(view, half, pill, style) {
  const goes = pill.at ? () => view.selectNode(pill.at[0], pill.at[1], { reveal: true }) : null;
  return make(
    goes ? "button" : "div",
    {
      class: `pill ${pill.kind} ${pill.precision ? precisionClass(pill.precision) : "plain"}`,
      style,
      "data-name": pill.name,
      title: `%${pill.name}${pill.type ? ` : ${pill.type}` : ""}${pill.precision ? `\n${precisionName(pill.precision)}` : ""}`,
      onclick:
        goes &&
        (event => {
          event.stopPropagation();
          goes();
        }),
    },
    make("span", {}, pill.text),
  );
}

/** Draw both directions; returns milliseconds it took. */
function drawGraph(view) {
  const started = performance.now();
  for (const direction of ["forward", "backward"]) {
    const half = view.model.half(view.when, direction);
    const column = document.getElementById(direction);
    const layout = layoutInside(view, half, { kind: "root", module: view.model.root });
    const place = drawInside(view, half, layout, { x: 0, y: 0 });
    place.classList.add("top");
    column.replaceChildren(place);
    document.getElementById(`${direction}-count`).textContent = `${count(half.size)} operators`;
  }
  return performance.now() - started;
}
