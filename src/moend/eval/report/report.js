"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const el = (tag, props = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), props);
    node.append(...children);
    return node;
  };
  const percent = (x) => (100 * x).toFixed(1);
  const mib = (bytes) => bytes / 1048576;
  const times = (x) => `${x >= 10 ? x.toFixed(1) : x.toFixed(2)}×`;

  // ---- methods: a colour and a dash each, the same everywhere -------------------------------------------------
  const methodOf = (run) => (run.scorer ? `${run.variant} · ${run.scorer}` : run.variant);
  const order = ["2d_heads", "2d_hetero", "2d", "2d_uniform", "1d"];
  const rank = (name) => {
    const i = order.indexOf(name.split(" · ")[0]);
    return i < 0 ? order.length : i;
  };
  const methods = [...new Set(data.suites.flatMap((s) => s.runs.map(methodOf)))]
    .filter((m) => m !== "full")
    .sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  const colours = 10;
  const dashes = ["none", "5 3", "1.5 2.5"];
  const colour = (m) => `var(--c${methods.indexOf(m) % colours})`;
  const dash = (m) => dashes[Math.floor(methods.indexOf(m) / colours) % dashes.length];
  const shown = new Set(methods);

  // ---- state ------------------------------------------------------------------------------------------------
  const suite = () => data.suites[$("suite").selectedIndex];
  const estimateOf = (run, dataset) => (dataset === "" ? run.mean : run.datasets[dataset]);
  const datasetsOf = (s) => [...new Set(s.runs.flatMap((r) => Object.keys(r.datasets)))];
  const options = (select, items) => select.replaceChildren(...items.map(([value, text]) => new Option(text, value)));

  function drawLegend() {
    const here = new Set(suite().runs.map(methodOf));
    $("legend").replaceChildren(
      ...methods.filter((m) => here.has(m)).map((m) => {
        const button = el("button", { type: "button", textContent: m });
        button.setAttribute("aria-pressed", shown.has(m));
        const swatch = d3.create("svg").attr("viewBox", "0 0 26 10").attr("aria-hidden", true);
        swatch.append("line").attr("x2", 26).attr("y1", 5).attr("y2", 5).attr("stroke", colour(m)).attr("stroke-width", 2.5)
          .attr("stroke-dasharray", dash(m));
        swatch.append("circle").attr("cx", 13).attr("cy", 5).attr("r", 3.5).attr("fill", colour(m));
        button.prepend(swatch.node());
        button.addEventListener("click", () => {
          shown.has(m) ? shown.delete(m) : shown.add(m);
          draw();
        });
        return button;
      }),
    );
  }

  function drawCurves() {
    const dataset = $("dataset").value;
    const byBytes = $("axis").value === "bytes";
    const points = suite().runs
      .map((run) => ({ run, method: methodOf(run), e: estimateOf(run, dataset), ratio: run.ratio, mib: mib(run.kv_bytes) }))
      .filter((p) => p.e && p.e.n > 0 && p.ratio > 0);
    const full = points.find((p) => p.method === "full");
    const drawn = points.filter((p) => p.method !== "full" && shown.has(p.method)).sort((a, b) => a.ratio - b.ratio);
    const x = byBytes ? "mib" : "ratio";
    const values = drawn.map((p) => p[x]);
    const [low, high] = values.length ? d3.extent(values) : [1, 16];
    const domain = [low / 1.12, high * 1.12];
    const steps = byBytes ? d3.range(-4, 20).map((i) => 2 ** i) : [1, 1.5, 2, 3, 4, 6, 8, 10, 14, 20, 30, 40, 60, 80, 120, 160];
    const ticks = steps.filter((v) => v >= domain[0] && v <= domain[1]);
    const marks = [Plot.gridX(ticks, { strokeOpacity: 0.08 }), Plot.gridY({ strokeOpacity: 0.08 })];
    if (full) {
      marks.push(
        Plot.rect([full], { y1: 100 * full.e.low, y2: 100 * full.e.high, fill: "currentColor", fillOpacity: 0.06 }),
        Plot.ruleY([100 * full.e.score], { stroke: "currentColor", strokeDasharray: "2 3" }),
        Plot.text([full], { frameAnchor: "right", y: 100 * full.e.score, dy: -8, dx: -4, text: () => "full cache", fill: "currentColor" }),
      );
    }
    marks.push(
      Plot.line(drawn, { x, y: (p) => 100 * p.e.score, z: "method", stroke: (p) => colour(p.method), strokeDasharray: (p) => dash(p.method), strokeWidth: (p) => (p.run.variant === "2d_hetero" ? 3 : 1.75), curve: "linear" }),
      Plot.ruleX(drawn, { x, y1: (p) => 100 * p.e.low, y2: (p) => 100 * p.e.high, stroke: (p) => colour(p.method), strokeOpacity: 0.45, strokeWidth: 1.5 }),
      Plot.dot(drawn, { x, y: (p) => 100 * p.e.score, fill: (p) => colour(p.method), stroke: "var(--panel)", strokeWidth: 1, r: 4 }),
      Plot.tip(drawn, Plot.pointer({
        x, y: (p) => 100 * p.e.score,
        title: (p) => `${p.method}\n${percent(p.e.score)}  [${percent(p.e.low)}, ${percent(p.e.high)}]  n = ${p.e.n}\n${times(p.ratio)}, ${p.mib.toFixed(2)} MiB${p.run.compression ? `, asked ${p.run.compression}×` : ""}`,
      })),
    );
    $("curve-plot").replaceChildren(Plot.plot({
      width: 1160, height: 460, marginLeft: 48, marginBottom: 42, marginRight: 24,
      style: { fontSize: "13px", background: "none" },
      x: { type: "log", label: byBytes ? "allocated K/V cache, MiB" : "allocated compression (16-bit bytes over allocated bytes)", labelAnchor: "center", labelArrow: "none", domain, reverse: byBytes, ticks,
        tickFormat: (v) => (byBytes ? `${v}` : `${v}×`) },
      y: { label: `${dataset === "" ? "mean score" : dataset}, percent`, domain: [0, 100], labelArrow: "none" },
      ariaLabel: "Score against the allocated bytes of the cache, a line a method, with 95% intervals",
      marks,
    }));
    const s = suite();
    const parts = [`${s.n_contexts} contexts, ${s.n_questions} questions, ${s.mode === "aware" ? "the question known while compressing" : "questions asked after compression"}; plans for ${s.context_length.toLocaleString("en")} tokens. Bars: 95% intervals.`];
    if (s.n_truncated) parts.push(`${s.n_truncated} contexts lost their middle to fit.`);
    if (s.n_malformed) parts.push(`${s.n_malformed} malformed rows were left out.`);
    if (!s.complete) parts.push("This evaluation is not finished.");
    $("curve-note").textContent = parts.join(" ");
  }

  function drawTable() {
    const s = suite();
    const datasets = datasetsOf(s);
    const full = s.runs.find((r) => r.variant === "full");
    const asked = $("asked").value;
    const runs = s.runs.filter((r) => r === full || (shown.has(methodOf(r)) && (asked === "" || !r.compression || r.compression === +asked)))
      .sort((a, b) => (b === full) - (a === full) || a.compression - b.compression || rank(methodOf(a)) - rank(methodOf(b)) || b.mean.score - a.mean.score);
    const cell = (run, dataset) => {
      const e = estimateOf(run, dataset);
      if (!e || !e.n) return el("td", { textContent: "–" });
      const td = el("td", {}, percent(e.score), el("small", { textContent: `${(100 * e.low).toFixed(0)}–${(100 * e.high).toFixed(0)}` }));
      const reference = full && full !== run && estimateOf(full, dataset);
      if (reference && e.score >= reference.low) td.className = "kept";
      return td;
    };
    // Against the full cache on the same questions, of the data set that is chosen above.
    const chosen = $("dataset").value;
    const pairedOf = (run) => run.paired?.[chosen] ?? {};
    const diverges = runs.some((run) => pairedOf(run).kld);
    const withInterval = (text, low, high, same) => el("td", {}, text, ...(same ? [] : [el("small", { textContent: `${low}–${high}` })]));
    const signed = (x) => `${x < 0 ? "−" : "+"}${percent(Math.abs(x))}`;
    const pairedCells = (run) => {
      const p = pairedOf(run), none = () => el("td", { textContent: "–" });
      const d = p.difference, k = p.kld;
      const td = d ? withInterval(signed(d.mean), signed(d.low), ` ${signed(d.high)}`, d.low === d.high) : none();
      if (d && d.high >= 0) td.className = "kept";
      if (!diverges) return [td];
      return [td,
        k ? withInterval(k.mean.toFixed(4), k.low.toFixed(4), k.high.toFixed(4), k.low === k.high) : none(),
        k ? el("td", { textContent: p.kld_99.toFixed(3) }) : none(),
        k ? el("td", { textContent: percent(p.same_top) }) : none(),
        p.answer_tokens ? el("td", { textContent: `${p.agreed.toFixed(1)} of ${p.answer_tokens.toFixed(1)}` }) : none()];
    };
    const pairedHead = ["vs full", ...(diverges ? ["KL", "KL, 99%", "same top", "same tokens"] : [])];
    const n = (dataset) => Math.max(...s.runs.map((r) => r.datasets[dataset]?.n ?? 0));
    const head = el("tr", {}, ...["method", "asked", "ratio", "MiB", ...pairedHead, "mean"].map((t) => el("th", { textContent: t, scope: "col" })),
      ...datasets.map((d) => el("th", { scope: "col" }, d, el("small", { textContent: ` n=${n(d)}` }))));
    const body = runs.map((run) => el("tr", { className: run === full ? "full" : "" },
      el("td", { textContent: methodOf(run) }),
      el("td", { textContent: run.compression ? `${run.compression}×` : "–" }),
      el("td", { textContent: times(run.ratio) }),
      el("td", { textContent: mib(run.kv_bytes).toFixed(2) }),
      ...pairedCells(run), cell(run, ""), ...datasets.map((d) => cell(run, d))));
    $("table").replaceChildren(el("table", {}, el("thead", {}, head), el("tbody", {}, ...body)));
  }

  // ---- plan and profile -------------------------------------------------------------------------------------
  const plans = [
    ...(data.plan ? [{ text: data.plan.source, layers: data.plan.layers }] : []),
    ...data.suites.flatMap((s) => s.runs.filter((r) => r.variant !== "full").map((r) => ({
      text: `${methodOf(r)}${r.compression ? ` ${r.compression}×` : ""} (${s.name})`, layers: r.layers,
      weight: (r.variant === "2d_hetero") + (r.variant === "2d_hetero" && r.compression === 14),
    }))),
  ];
  const plan = () => plans[$("plan-run").selectedIndex];
  const expertText = (e) => `${+(100 * e.keep).toPrecision(3)}% K${e.k_bits}V${e.v_bits}`;
  const same = (a, b) => Math.abs(a.keep - b.keep) < 1e-9 && a.k_bits === b.k_bits && a.v_bits === b.v_bits;

  function drawPlan() {
    if (!plans.length) return;
    // A bar a layer, or a bar a KV head (3.0, 3.1) where heads are routed one by one.
    const layers = plan().layers
      .flatMap((e, i) => (e.heads ? e.heads.map((head, h) => ({ ...head, layer: `${i}.${h}` })) : [{ ...e, layer: i }]))
      .map((e) => ({ ...e, bits: (e.k_bits + e.v_bits) / 2 }));
    const width = 1160, marginLeft = 64;
    const x = { label: null, domain: layers.map((e) => e.layer), padding: 0.12, tickSize: 0 };
    const style = { fontSize: "13px", background: "none" };
    const bits = layers.flatMap((e) => [{ layer: e.layer, part: "K", bits: e.k_bits }, { layer: e.layer, part: "V", bits: e.v_bits }]);
    $("plan-plot").replaceChildren(
      Plot.plot({
        width, height: 195, marginLeft, marginRight: 20, marginBottom: 8, style, x: { ...x, axis: null },
        y: { label: "tokens kept, percent", grid: true, domain: [0, 100], ticks: 5, labelArrow: "none" },
        ariaLabel: "Share of the tokens that each layer keeps",
        marks: [
          Plot.barY(layers, { x: "layer", y: (e) => 100 * e.keep, fill: "var(--c0)", rx: 2, title: (e) => `layer ${e.layer}: ${expertText(e)}` }),
          Plot.text(layers, { x: "layer", y: (e) => 100 * e.keep, dy: -8, text: (e) => +(100 * e.keep).toPrecision(3), fill: "currentColor", fontSize: layers.length > 40 ? 9 : 11 }),
        ],
      }),
      Plot.plot({
        width, height: 110, marginLeft, marginRight: 20, marginBottom: 36, style,
        x: { ...x, label: plan().layers[0]?.heads ? "layer and KV head" : "layer", labelAnchor: "center", labelArrow: "none" },
        y: { label: null, domain: ["K", "V"], padding: 0.12, tickSize: 0, tickFormat: (p) => `${p} bits` },
        ariaLabel: "Bits of an element of K and V in each layer",
        marks: [
          Plot.cell(bits, { x: "layer", y: "part", fill: "var(--c1)", fillOpacity: (b) => 0.12 + 0.8 * (Math.log2(b.bits) - 1) / 3, rx: 2 }),
          Plot.text(bits, { x: "layer", y: "part", text: "bits", fill: "currentColor", fontSize: layers.length > 40 ? 9 : 12 }),
        ],
        opacity: { type: "identity" },
      }),
    );
    const kept = d3.mean(layers, (e) => e.keep), mean = d3.sum(layers, (e) => e.keep * e.bits) / d3.sum(layers, (e) => e.keep);
    $("plan-note").textContent = `On average ${percent(kept)}% of the tokens stay, at ${mean.toFixed(2)} bits an element of those kept, scales not counted.`;
  }

  function drawHeat() {
    const profile = data.profile;
    if (!profile) return;
    $("heat").hidden = false;
    const key = $("loss").value;
    const experts = profile.experts.map((e, i) => ({ ...e, i, text: expertText(e), size: e.keep * (e.k_bits + e.v_bits) })).sort((a, b) => a.size - b.size || a.keep - b.keep);
    const cells = profile[key].flatMap((row, layer) => experts.map((e) => ({ layer, expert: e.text, loss: row[e.i], size: e.size })));
    const chosen = plans.length && !plan().layers[0].heads ? plan().layers.flatMap((p, layer) => experts.filter((e) => same(e, p)).map((e) => ({ layer, expert: e.text }))) : [];
    const positive = cells.map((c) => c.loss).filter((v) => v > 0);
    const floor = positive.length ? Math.max(d3.min(positive), d3.max(positive) * 1e-6) : 1e-6;
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    $("heat-plot").replaceChildren(Plot.plot({
      width: 1160, height: 110 + 20 * profile[key].length, marginLeft: 48, marginBottom: 92, marginTop: 12,
      style: { fontSize: "12px", background: "none" },
      x: { label: null, domain: experts.map((e) => e.text), tickRotate: -60, tickSize: 0 },
      y: { label: "layer", labelAnchor: "center", labelArrow: "none", tickSize: 0 },
      color: { type: "log", scheme: dark ? "inferno" : "ylgnbu", domain: [floor, d3.max(positive) ?? 1], clamp: true, legend: true, label: key === "kl" ? "KL divergence, nats a token" : "relative L2 error", tickFormat: "~g", ticks: d3.ticks(Math.ceil(Math.log10(floor)), Math.floor(Math.log10(d3.max(positive) ?? 1)), 5).map((e) => 10 ** e), width: 320 },
      ariaLabel: "Loss of every expert in every layer",
      marks: [
        Plot.cell(cells, { x: "expert", y: "layer", fill: (c) => Math.max(c.loss, floor), inset: 0.5, rx: 1.5, tip: true, title: (c) => `layer ${c.layer}, ${c.expert}\n${c.loss.toPrecision(3)}` }),
        Plot.cell(chosen, { x: "expert", y: "layer", fill: "none", stroke: "var(--frame)", strokeWidth: 2.5, inset: 0, rx: 2 }),
      ],
    }));
    $("heat-note").textContent = `Each cell: what the model loses when this layer alone keeps that share of its tokens at those bits; from ${profile.chunks} ${profile.chunks === 1 ? "text" : "texts"} of ${profile.length.toLocaleString("en")} tokens, ${profile.scorer.includes(",") ? "a scorer for each layer" : `scorer ${profile.scorer}`}. Fewer bytes to the left.${chosen.length ? " Framed: the plan above." : ""}`;
  }

  // ---- together ---------------------------------------------------------------------------------------------
  function draw() {
    drawLegend();
    drawCurves();
    drawTable();
  }
  function drawSuite() {
    const before = $("dataset").value;
    options($("dataset"), [["", "mean of all"], ...datasetsOf(suite()).map((d) => [d, d])]);
    const ratios = [...new Set(suite().runs.map((r) => r.compression).filter((c) => c > 0))].sort((a, b) => a - b);
    options($("asked"), [["", "any"], ...ratios.map((c) => [c, `${c}×`])]);
    if (suite().runs.length > 16) $("asked").value = ratios.includes(14) ? 14 : ratios[Math.floor(ratios.length / 2)] ?? "";
    if ([...$("dataset").options].some((o) => o.value === before)) $("dataset").value = before;
    draw();
  }

  $("subtitle").textContent = data.subtitle;
  $("footer").textContent = data.footer;
  if (!globalThis.Plot || !data.suites.length) return;
  options($("suite"), data.suites.map((s, i) => [i, `${s.name}, ${s.mode}`]));
  options($("plan-run"), plans.map((p, i) => [i, p.text]));
  if (!data.plan && plans.length) $("plan-run").selectedIndex = d3.maxIndex(plans, (p) => p.weight);
  $("plan").hidden = !plans.length;
  $("suite").addEventListener("change", drawSuite);
  for (const id of ["dataset", "axis"]) $(id).addEventListener("change", draw);
  $("asked").addEventListener("change", drawTable);
  $("plan-run").addEventListener("change", () => { drawPlan(); drawHeat(); });
  $("loss").addEventListener("change", drawHeat);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawHeat);
  drawSuite();
  drawPlan();
  drawHeat();
})();
