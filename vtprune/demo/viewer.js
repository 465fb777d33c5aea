// Draws what a pruned prefill saw. Runs in the page with `element`, `props` and `watch` of the component around it.
// The value is what vtprune/demo/survival.py makes: views (pictures with a grid of tokens) and runs (when each token left).
const NS = "http://www.w3.org/2000/svg";
const state = { mode: "left", step: null, token: null, pinned: false };

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function draw(tag, attributes) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// from blue over green to yellow: even steps of lightness, so that it also reads without colour
function ramp(share) {
  const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
  const at = Math.min(0.9999, Math.max(0, share)) * (stops.length - 1);
  const low = Math.floor(at);
  return "rgb(" + stops[low].map((part, i) => Math.round(part + (at - low) * (stops[low + 1][i] - part))).join(",") + ")";
}

// of every scored token the share of scored tokens that score lower
function ranksOf(values) {
  const order = values.map((value, token) => [value, token]).filter((pair) => pair[0] !== null).sort((a, b) => a[0] - b[0]);
  const ranks = new Array(values.length).fill(null);
  order.forEach((pair, place) => { ranks[pair[1]] = place; });
  return { ranks, count: order.length };
}

function build() {
  const data = props.value && props.value.views ? props.value : null;
  const root = element.querySelector(".vtp-viewer");
  if (!root) return;
  root.replaceChildren();
  root.hidden = !data;
  if (!data) return;
  for (const run of data.runs) for (const scored of run.scores) Object.assign(scored, ranksOf(scored.values));
  const longest = Math.max(...data.runs.map((run) => run.steps.length));
  state.step = longest - 1;
  state.token = null;
  state.pinned = false;

  const mode = make("select", { "aria-label": "What to show" });
  const shown = [["left", "what is left"], ["gone", "when it left"]];
  if (data.runs.some((run) => run.scores.length)) shown.push(["scores", "how it scored"]);
  if (!shown.some((pair) => pair[0] === state.mode)) state.mode = "left";
  for (const [value, text] of shown) mode.append(make("option", { value }, text));
  mode.value = state.mode;
  const slider = make("input", { type: "range", min: 0, max: longest - 1, step: 1, "aria-label": "Depth in the model" });
  slider.value = state.step;
  const info = make("p", { class: "vtp-info", "aria-live": "polite" });
  root.append(make("div", { class: "vtp-controls" }, make("label", {}, "show ", mode), make("label", { class: "vtp-depth" }, "depth ", slider)));

  // the decoder is the same for all runs: they are aligned at its end
  const stepOf = (run) => Math.max(0, state.step - (longest - run.steps.length));
  const panels = data.runs.map((run) => {
    const caption = make("figcaption", {}, make("b", {}, run.title), make("span", { class: "vtp-at" }));
    const views = make("div", { class: "vtp-views" });
    const cells = new Array(run.total).fill(null);
    for (const view of data.views) {
      const box = draw("svg", { viewBox: "0 0 " + view.wide + " " + view.high, role: "img", tabindex: 0 });
      box.setAttribute("aria-label", view.title + ", " + view.rows + " by " + view.cols + " patches; arrow keys move between them");
      box.append(draw("image", { href: view.src, width: view.wide, height: view.high, preserveAspectRatio: "none" }));
      for (let row = 0; row < view.rows; row++) for (let col = 0; col < view.cols; col++) {
        const token = view.first + row * view.stride + col;
        const cell = draw("rect", {
          x: (col * view.wide) / view.cols, y: (row * view.high) / view.rows,
          width: view.wide / view.cols, height: view.high / view.rows, "data-token": token,
        });
        cells[token] = cell;
        box.append(cell);
      }
      const title = view.title + (view.guess ? " (which pixels a patch covers is a guess)" : "");
      views.append(make("div", { class: "vtp-view" }, box, make("span", {}, title)));
    }
    root.append(make("figure", {}, caption, views));
    return { run, caption, cells };
  });
  root.append(info, legend());

  function legend() {
    const bar = make("span", { class: "vtp-ramp" });
    for (let i = 0; i < 24; i++) { const part = make("i"); part.style.background = ramp(i / 23); bar.append(part); }
    return make("p", { class: "vtp-legend" }, make("span", {}), bar, make("span", {}));
  }

  function scoredAt(run) {
    const before = run.scores.filter((scored) => scored.step <= stepOf(run));
    return before.length ? before[before.length - 1] : run.scores[0];
  }

  function paint() {
    for (const { run, caption, cells } of panels) {
      const step = stepOf(run), here = run.steps[step], scored = scoredAt(run);
      let text = here.label + ": " + here.left + " of " + run.total + " tokens";
      if (state.mode === "scores") text = scored ? "scores " + scored.label : "this method gives no scores";
      caption.querySelector(".vtp-at").textContent = text;
      const last = run.steps.length - 1;
      cells.forEach((cell, token) => {
        if (!cell) return;
        const gone = run.gone[token];
        let fill = "none", kind = "there";
        if (state.mode === "left") {
          if (gone !== null && gone <= step) kind = run.into[token] === null ? "gone" : "merged";
        } else if (state.mode === "gone") {
          if (gone !== null) { kind = "aged"; fill = ramp(gone / last); }
        } else if (scored && scored.ranks[token] !== null) {
          kind = "scored";
          fill = ramp(scored.ranks[token] / Math.max(1, scored.count - 1));
        } else kind = "gone";
        cell.setAttribute("class", "vtp-" + kind + (token === state.token ? " vtp-here" : ""));
        cell.setAttribute("fill", fill);
      });
    }
    const ends = { left: ["", ""], gone: ["left early", "left late; clear patches stayed"], scores: ["low score", "high score; grey was not scored"] }[state.mode];
    const line = root.querySelector(".vtp-legend");
    line.hidden = state.mode === "left";
    line.firstChild.textContent = ends[0];
    line.lastChild.textContent = ends[1];
    tell();
  }

  function tell() {
    if (state.token === null) {
      info.textContent = "Point at a patch, or click it, to see its score and where it left.";
      return;
    }
    const where = placeOf(state.token);
    const each = data.runs.map((run) => {
      const gone = run.gone[state.token], scored = scoredAt(run);
      const word = run.into[state.token] === null ? "gone " : "merged into " + placeOf(run.into[state.token]) + " ";
      let text = gone === null ? "stayed to the end" : word + (run.steps[gone].label.startsWith("decoder") ? "at " : "") + run.steps[gone].label;
      const guests = run.into.filter((owner) => owner === state.token).length;
      if (guests) text += ", with " + guests + " merged into it";
      if (scored && scored.ranks[state.token] !== null) {
        text += "; score " + Number(scored.values[state.token]).toPrecision(3) + " " + scored.label + ", rank " + (scored.count - scored.ranks[state.token]) + " of " + scored.count;
      }
      return (data.runs.length > 1 ? run.title + ": " : "") + text;
    });
    info.textContent = where + ": " + each.join(" | ");
  }

  function placeOf(token) {
    const view = data.views.find((each) => token >= each.first && token < each.first + each.rows * each.stride);
    if (!view) return "a row end";
    const at = token - view.first;
    return view.title + ", row " + (Math.floor(at / view.stride) + 1) + ", column " + ((at % view.stride) + 1);
  }

  function choose(token, pin) {
    if (pin) state.pinned = !(state.pinned && token === state.token);
    else if (state.pinned) return;
    state.token = token;
    for (const { cells } of panels) cells.forEach((cell, i) => cell && cell.classList.toggle("vtp-here", i === token));
    tell();
  }

  function tokenOf(event) {
    const cell = event.target.closest ? event.target.closest("rect[data-token]") : null;
    return cell ? Number(cell.dataset.token) : null;
  }

  mode.addEventListener("change", () => { state.mode = mode.value; paint(); });
  slider.addEventListener("input", () => { state.step = Number(slider.value); paint(); });
  for (const box of root.querySelectorAll("svg")) {
    box.addEventListener("pointermove", (event) => { const token = tokenOf(event); if (token !== null) choose(token, false); });
    box.addEventListener("pointerleave", () => { if (!state.pinned) choose(null, false); });
    box.addEventListener("click", (event) => { const token = tokenOf(event); if (token !== null) choose(token, true); });
    box.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!move) return;
      event.preventDefault();
      const firstCell = Number(box.querySelector("rect").dataset.token);
      const view = data.views.find((each) => each.first === firstCell);
      const inside = state.token !== null && state.token >= view.first && state.token < view.first + view.rows * view.stride;
      const at = inside ? state.token - view.first : 0;
      const row = Math.min(view.rows - 1, Math.max(0, Math.floor(at / view.stride) + (inside ? move[0] : 0)));
      const col = Math.min(view.cols - 1, Math.max(0, (at % view.stride) + (inside ? move[1] : 0)));
      state.pinned = false;
      choose(view.first + row * view.stride + col, true);
    });
  }
  paint();
}

build();
watch("value", build);
