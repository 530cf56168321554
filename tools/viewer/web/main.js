// State, keys, addresses. `view` is what is shown; everything else reads it.

class View {
  constructor(model) {
    this.model = model;
    this.when = "after";
    this.tab = "graph";
    this.open = new Set();
    this.selected = null;
    this.zoom = 1;
    this.items = new Map();
    this.layouts = new Map();
    this.precisions = new Map();
    this.index = new Map();
    this.drawMs = 0;
  }
  isOpen(item) {
    return this.open.has(item.id);
  }
  isSelected(half, item) {
    const s = this.selected;
    if (!s) return false;
    if (s.kind === "node") return item.kind === "op" && s.half === half.index && s.node === item.node;
    return item.kind === "module" ? item.module === s.module : item.kind === "fold" && item.fold.shown === s.module;
  }
  /** The same module in the other direction, and GEMMs of the same weight. */
  isLinked(half, item) {
    const s = this.selected;
    if (!s || s.kind !== "node") return false;
    const from = this.model.halves[s.half];
    if (item.kind === "op")
      return (
        !this.isSelected(half, item) &&
        from.gemm[s.node] > 0 &&
        half.gemm[item.node] > 0 &&
        isGemmOp(half.opOf(item.node)) &&
        this.model.strings[half.use[item.node]] === this.model.strings[from.use[s.node]]
      );
    const module = item.kind === "module" ? item.module : item.kind === "fold" ? item.fold.shown : null;
    return module !== null && module.parent !== null && half.index !== s.half && module === from.modules[s.node];
  }
  toggle(item) {
    const open = !this.open.has(item.id);
    if (!open) this.open.delete(item.id);
    else {
      this.open.add(item.id);
      const module = item.kind === "fold" ? item.fold.shown : item.module;
      if (module) this.openOnlyChildren(module);
    }
  }
  /** Which members the folds inside a path show. */
  foldKey(path) {
    return this.model.folds
      .filter(f => f.at && f.id.startsWith(path))
      .map(f => `${f.id}=${f.at}`)
      .join(" ");
  }
  /** A module that holds one module and nothing else opens with it. */
  openOnlyChildren(module) {
    for (const half of this.model.halves.filter(h => h.when === this.when)) {
      const { items } = itemsOf(this, half, module);
      const [only] = items.values();
      if (items.size === 1 && only.module && !this.open.has(only.id)) {
        this.open.add(only.id);
        this.openOnlyChildren(only.module);
      }
    }
  }
  /** Draw, and keep a box (of a direction and an id) where it stood. */
  draw(anchor) {
    const before = anchor && boxAt(anchor)?.getBoundingClientRect();
    this.drawMs = drawGraph(this);
    const after = before && boxAt(anchor)?.getBoundingClientRect();
    if (after) {
      const column = document.getElementById(anchor.direction);
      column.scrollTop += after.top - before.top;
      column.scrollLeft += after.left + Math.min(after.width, column.clientWidth) / 2 - before.left - before.width / 2;
    }
    document.body.dataset.drawMs = this.drawMs.toFixed(1);
    document.body.dataset.boxes = String(document.querySelectorAll("#graph .box").length);
    this.prepareNext();
  }
  /** While nobody acts, lay out what the next click may unfold: the boxes in sight. */
  prepareNext() {
    clearTimeout(this.waiting);
    if (this.idle) cancelIdleCallback(this.idle);
    delete document.body.dataset.prepared;
    let closed = null;
    const step = deadline => {
      closed =
        closed ||
        [...document.querySelectorAll('#graph .box[aria-expanded="false"]')]
          .filter(isInSight)
          .map(box => itemOfBox(this, box).item)
          .filter(item => item.kind !== "part");
      do {
        if (!closed.length) break;
        this.layOutWith(closed.shift());
      } while (deadline.timeRemaining() > 25);
      if (closed.length) this.idle = requestIdleCallback(step, { timeout: 200 });
      else document.body.dataset.prepared = "yes";
    };
    this.waiting = setTimeout(() => {
      this.idle = requestIdleCallback(step, { timeout: 200 });
    }, 150);
  }
  /** Lay out both directions as if one more item were open; nothing is drawn. */
  layOutWith(item) {
    const open = this.open;
    this.open = new Set(open);
    this.toggle(item);
    for (const half of this.model.halves)
      if (half.when === this.when) layoutInside(this, half, { kind: "root", module: this.model.root });
    this.open = open;
  }
  showMember(fold, at) {
    const before = fold.shown,
      after = fold.members[at];
    fold.at = at;
    for (const id of [...this.open]) {
      // what was open inside stays open in the next member
      const [kind, path] = [id.slice(0, id.indexOf(":")), id.slice(id.indexOf(":") + 1)];
      if ((kind === "module" || kind === "part") && path.startsWith(before.path + "."))
        this.open.add(`${kind}:${after.path}${path.slice(before.path.length)}`);
      if (kind === "part" && path.startsWith(before.path + "#"))
        this.open.add(`part:${after.path}${path.slice(before.path.length)}`);
    }
    this.precisions.clear();
    this.selectModule(after);
  }
  /** Open everything around a module. */
  revealModule(module) {
    for (let m = module; m.parent; m = m.parent) {
      if (m.fold) m.fold.at = m.fold.members.indexOf(m);
      if (m !== module) this.open.add(m.fold ? `fold:${m.fold.id}` : `module:${m.path}`);
    }
    this.precisions.clear();
  }
  selectModule(module, { reveal = false, anchor = null } = {}) {
    this.selected = { kind: "module", module };
    if (reveal) {
      this.showTab("graph");
      this.revealModule(module);
    }
    this.show(reveal, anchor);
  }
  selectNode(halfIndex, node, { reveal = false, anchor = null } = {}) {
    const half = this.model.halves[halfIndex];
    this.selected = { kind: "node", half: halfIndex, node };
    if (reveal) {
      this.showTab("graph");
      this.setWhen(half.when);
      const module = half.modules[node];
      this.revealModule(module);
      if (module.parent) this.open.add(module.fold ? `fold:${module.fold.id}` : `module:${module.path}`);
      const drawn = half.isDrawn(node) ? node : [...half.inputs[node]].find(n => n >= 0 && half.isDrawn(n));
      for (const item of itemsOf(this, half, module).items.values())
        if (item.kind === "part" && item.nodes.includes(drawn ?? node)) this.open.add(item.id);
    }
    this.show(reveal, anchor);
  }
  show(scroll, anchor) {
    this.draw(anchor);
    drawPanel(this);
    this.setAddress();
    if (!scroll) return;
    for (const direction of ["forward", "backward"]) {
      const column = document.getElementById(direction);
      const target = column.querySelector(".selected") || column.querySelector(".linked");
      if (target) center(column, target);
    }
    const own = this.selected.kind === "node" ? this.model.halves[this.selected.half].direction : "forward";
    const focus = document.querySelector(`#${own} .selected`) || document.querySelector("#graph .selected");
    if (focus) focus.focus({ preventScroll: true });
  }
  setWhen(when) {
    if (this.when === when) return;
    this.when = when;
    for (const b of document.querySelectorAll("[data-when]"))
      b.setAttribute("aria-pressed", String(b.dataset.when === when));
  }
  switchWhen(when) {
    const s = this.selected;
    this.setWhen(when);
    if (s && s.kind === "node") {
      const half = this.model.halves[s.half];
      if (half.when !== when) {
        const [twin] = twinsOf(this, half, s.node);
        if (twin) return this.selectNode(twin[0].index, twin[1], { reveal: true });
        return this.selectModule(half.modules[s.node], { reveal: true });
      }
    }
    this.show(false);
  }
  goTo(path) {
    const module = this.model.byPath.get(path);
    if (module) this.selectModule(module, { reveal: true });
  }
  showTab(tab) {
    this.tab = tab;
    document.body.classList.toggle("on-tables", tab !== "graph");
    for (const b of document.querySelectorAll("[role=tab]"))
      b.setAttribute("aria-selected", String(b.dataset.tab === tab));
    document.getElementById("graph").hidden = tab !== "graph";
    const page = document.getElementById("tables");
    page.hidden = tab === "graph";
    if (tab !== "graph" && page.dataset.tab !== tab) {
      page.replaceChildren(...TABS[tab](this).filter(Boolean));
      page.dataset.tab = tab;
      page.scrollTop = 0;
    }
  }
  setZoom(zoom) {
    this.zoom = Math.min(2, Math.max(0.3, zoom));
    document.getElementById("graph").style.setProperty("--zoom", this.zoom);
    document.getElementById("zoom").textContent = `${Math.round(100 * this.zoom)} %`;
  }
  setAddress() {
    const s = this.selected,
      parts = new URLSearchParams();
    if (this.when !== "after") parts.set("when", this.when);
    if (s && s.kind === "node") parts.set("node", this.model.halves[s.half].nameOf(s.node));
    if (s && s.kind === "node") parts.set("half", this.model.halves[s.half].direction);
    if (s && s.kind === "module") parts.set("module", s.module.path);
    history.replaceState(null, "", parts.size ? `#${parts}` : location.pathname + location.search);
  }
  goToAddress(hash) {
    const parts = new URLSearchParams(hash.slice(1));
    if (parts.get("when") === "before") this.setWhen("before");
    const half = this.model.half(this.when, parts.get("half") || "forward");
    const node = parts.has("node") && half ? half.find(parts.get("node")) : undefined;
    if (node !== undefined) this.selectNode(half.index, node, { reveal: true });
    else if (parts.has("module")) this.goTo(parts.get("module"));
    if (TABS[parts.get("tab")]) this.showTab(parts.get("tab"));
  }
  closeSearch() {
    document.getElementById("results").hidden = true;
    document.getElementById("search").setAttribute("aria-expanded", "false");
  }
}

function center(column, target) {
  const box = target.getBoundingClientRect(),
    frame = column.getBoundingClientRect();
  const top =
    box.height > frame.height * 0.8 ? box.top - frame.top - 20 : box.top - frame.top - (frame.height - box.height) / 2;
  column.scrollTop += top;
  column.scrollLeft += box.left - frame.left - (frame.width - box.width) / 2;
}

/** The item behind a box on the page. */
function itemOfBox(view, element) {
  const half = view.model.halves[Number(element.dataset.half)],
    id = element.dataset.id;
  if (element.dataset.node) return { half, item: { id, kind: "op", node: half.find(element.dataset.node), half } };
  if (id.startsWith("part:")) return { half, item: { id, kind: "part" } };
  const module = view.model.byPath.get(element.dataset.path);
  return {
    half,
    item: id.startsWith("fold:") ? { id, kind: "fold", fold: module.fold } : { id, kind: "module", module },
  };
}

function listen(view) {
  const graph = document.getElementById("graph");
  graph.addEventListener("click", event => {
    const element = event.target.closest(".box");
    if (!element || event.target.closest("button")) return;
    act(view, element, event.target.closest(".head") !== null || !element.classList.contains("open"));
  });
  graph.addEventListener("keydown", event => {
    const element = event.target.closest(".box");
    if (!element || event.target !== element) return;
    const expanded = element.getAttribute("aria-expanded");
    if (event.key === "Enter" || event.key === " ") act(view, element, true);
    else if (event.key === "ArrowDown") move(element, 1);
    else if (event.key === "ArrowUp") move(element, -1);
    else if (event.key === "ArrowRight") expanded === "false" ? act(view, element, true) : across(element, "backward");
    else if (event.key === "ArrowLeft") expanded === "true" ? act(view, element, true) : across(element, "forward");
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", event => {
    if (event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") {
      document.getElementById("search").focus();
      event.preventDefault();
    } else if (event.key === "b") view.switchWhen(view.when === "after" ? "before" : "after");
    else if (event.key === "Escape") {
      view.selected = null;
      view.show(false);
    } else if (event.key === "+" || event.key === "=") view.setZoom(view.zoom * 1.2);
    else if (event.key === "-") view.setZoom(view.zoom / 1.2);
  });
  for (const b of document.querySelectorAll("[data-when]"))
    b.addEventListener("click", () => view.switchWhen(b.dataset.when));
  for (const b of document.querySelectorAll("[role=tab]"))
    b.addEventListener("click", () => view.showTab(b.dataset.tab));
  document.getElementById("zoom-in").addEventListener("click", () => view.setZoom(view.zoom * 1.2));
  document.getElementById("zoom-out").addEventListener("click", () => view.setZoom(view.zoom / 1.2));
  document.getElementById("zoom").addEventListener("click", () => view.setZoom(1));
  document.getElementById("plumbing").addEventListener("change", event => {
    for (const half of view.model.halves) {
      half.showsPlumbing = event.target.checked;
      half._sources = null;
      half.count();
    }
    view.items.clear();
    view.layouts.clear();
    view.precisions.clear();
    view.index.clear();
    view.show(false);
  });
  document.getElementById("theme").addEventListener("click", () => {
    const chosen = document.documentElement.dataset.theme;
    const isDark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = isDark ? "light" : "dark";
  });
  for (const column of document.querySelectorAll(".column-body"))
    column.addEventListener("scroll", () => view.prepareNext(), { passive: true });
  window.addEventListener("hashchange", () => view.goToAddress(location.hash));
  listenToSearch(view);
}

function listenToSearch(view) {
  const input = document.getElementById("search"),
    list = document.getElementById("results");
  let at = -1;
  const mark = to => {
    const rows = list.querySelectorAll(".result");
    if (!rows.length) return;
    at = (to + rows.length) % rows.length;
    rows.forEach((r, i) => r.classList.toggle("at", i === at));
    rows[at].scrollIntoView({ block: "nearest" });
    input.setAttribute("aria-activedescendant", rows[at].id);
  };
  const update = () => {
    const { total, shown } = findAll(view, input.value);
    const words = input.value.trim();
    list.hidden = !words;
    input.setAttribute("aria-expanded", String(Boolean(words)));
    at = -1;
    list.replaceChildren(
      make(
        "div",
        { class: "dim small total" },
        !words
          ? ""
          : total
            ? `${count(total)} found${total > shown.length ? `, the first ${shown.length} shown` : ""}; identical ones count once`
            : "nothing found: words of paths, operators, roles and precisions (e4m3, bf16) are searched",
      ),
      ...shown.map((e, i) => resultRow(view, e, i)),
    );
    if (shown.length) mark(0);
  };
  input.addEventListener("input", update);
  input.addEventListener("focus", () => {
    if (input.value.trim()) update();
  });
  input.addEventListener("keydown", event => {
    if (event.key === "ArrowDown") mark(at + 1);
    else if (event.key === "ArrowUp") mark(at - 1);
    else if (event.key === "Enter") {
      const row = list.querySelectorAll(".result")[at];
      if (row) row.click();
    } else if (event.key === "Escape") {
      view.closeSearch();
      input.blur();
    } else return;
    event.preventDefault();
  });
  document.addEventListener("click", event => {
    if (!event.target.closest(".searching")) view.closeSearch();
  });
}

function act(view, element, toggles) {
  const { half, item } = itemOfBox(view, element);
  const anchor = { direction: half.direction, id: item.id };
  if (item.kind === "op") view.selectNode(half.index, item.node, { anchor });
  else {
    if (toggles) view.toggle(item);
    if (item.kind === "part") view.show(false, anchor);
    else view.selectModule(item.kind === "fold" ? item.fold.shown : item.module, { anchor });
  }
  const again = boxAt(anchor);
  if (again) again.focus({ preventScroll: true });
  const other = { direction: half.direction === "forward" ? "backward" : "forward", id: item.id };
  const twin =
    item.kind === "part"
      ? null
      : item.kind === "op"
        ? document.querySelector(`#${other.direction} .linked`)
        : boxAt(other);
  if (twin && !isInSight(twin)) center(twin.closest(".column-body"), twin);
}
const boxAt = ({ direction, id }) => document.querySelector(`#${direction} .box[data-id="${CSS.escape(id)}"]`);
function isInSight(element) {
  const box = element.getBoundingClientRect(),
    frame = element.closest(".column-body").getBoundingClientRect();
  const middle = box.left + box.width / 2;
  return box.top >= frame.top && box.top < frame.bottom - 60 && middle > frame.left && middle < frame.right;
}
function move(element, by) {
  const all = [...element.closest(".column-body").querySelectorAll(".box")];
  const next = all[all.indexOf(element) + by];
  if (next) {
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
}
function across(element, direction) {
  const next = document.querySelector(`#${direction} .box[data-id="${CSS.escape(element.dataset.id)}"]`);
  if (next && next !== element) {
    next.focus({ preventScroll: true });
    center(next.closest(".column-body"), next);
  }
}

async function start() {
  const began = performance.now();
  const address = location.hash; // drawing writes it anew
  const model = new Model(await unpack(document.getElementById("data").textContent.trim()));
  const view = new View(model);
  document.title = `fp8c: ${model.data.model.name}`;
  document.getElementById("name").textContent = model.data.model.name;
  document.getElementById("under").textContent = `${model.data.spec} · ${model.data.target.name}`;
  listen(view);
  for (const child of model.root.children)
    if (child.children.length) {
      // the decoder and its list of layers start open
      view.open.add(`module:${child.path}`);
      for (const list of child.children)
        if (list.children.length && list.children.every(c => /^\d+$/.test(c.name)))
          view.open.add(`module:${list.path}`);
    }
  view.show(false);
  for (const column of document.querySelectorAll(".column-body"))
    column.scrollLeft = (column.scrollWidth - column.clientWidth) / 2;
  view.goToAddress(address);
  document.body.dataset.ready = (performance.now() - began).toFixed(1);
}
start();
