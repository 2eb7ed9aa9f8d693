"use strict";
/** A circuit drawn by layers, the target on top: features, errors and embeddings are buttons, the edges lie behind. */
{
  const { el, svg, replace, signed, percent } = Vitrine.dom;
  const DRAWN = 120; // edges at first, the strongest between features and into the target; of what is chosen, all
  const WIDEST = 7; // pixels of the strongest edge

  /** @param {Object} group the API's CircuitGroup @returns {string} */
  function name({ kind, layer, index, label }) {
    if (kind === "embedding") return "Embeddings";
    return kind === "error" ? `Error ${layer}` : (label ?? `#${index}`);
  }

  /** @param {Object} circuit the API's GroupedCircuit @returns {string} what its edges lead to in the end */
  function targetName({ targets, contrast }) {
    const labels = Object.keys(targets);
    const label = labels.length === 1 ? labels[0] : "Each image's top-1";
    return contrast === null ? label : `${label} rather than ${contrast}`;
  }

  /**
   * @param {Object} circuit the API's GroupedCircuit
   * @returns {Object[]} its edges with their `strength`: the part of the target's influence that goes along each
   */
  function strengths({ edges, groups }) {
    const sums = new Map();
    for (const { target, weight } of edges) sums.set(target, (sums.get(target) ?? 0) + Math.abs(weight));
    return edges
      .map((edge) => {
        const influence = edge.target === null ? 1 : groups[edge.target].influence;
        return { ...edge, strength: (influence * Math.abs(edge.weight)) / (sums.get(edge.target) || 1) };
      })
      .sort((one, other) => other.strength - one.strength);
  }

  /**
   * @param {HTMLElement} frame gets the drawing
   * @param {Object} circuit the API's GroupedCircuit
   * @param {Object[]} edges of `strengths`
   * @param {function(?number)} onChosen told the place of the group that is chosen, null of none
   * @returns {{choose: function(?number)}} choose: from elsewhere
   */
  function create(frame, circuit, edges, onChosen) {
    const { groups } = circuit;
    const most = Math.max(...groups.filter(({ kind }) => kind === "feature").map(({ influence }) => influence));
    const between = edges.filter(({ source }) => groups[source].kind === "feature");
    const lines = svg("svg", { class: "edges", "aria-hidden": "true", focusable: "false" });
    const target = el("p", { class: "box target" }, el("b", {}, targetName(circuit)), logit());
    const boxes = groups.map(box);
    let chosen = null;

    const layers = [...Array(circuit.layers).keys()].reverse();
    const of = (layer) => boxes.filter((_, place) => groups[place].layer === layer);
    const rows = [
      row("Target", [target]),
      ...layers.map((layer) => row(`Layer ${layer}`, of(layer))),
      row("Input", of(null)),
    ];
    const drawing = el("div", { class: "drawing" }, lines, el("ol", { class: "rows" }, rows));
    frame.append(drawing);
    new ResizeObserver(draw).observe(drawing);

    function logit() {
      const mean = circuit.images > 1 ? "mean logit" : "logit";
      return el("span", { class: "size" }, `${mean} ${signed(circuit.logit, 2)}`);
    }

    function row(title, inside) {
      if (inside.length === 0) return null;
      return el("li", {}, el("span", { class: "row-name" }, title), el("div", { class: "boxes" }, inside));
    }

    function box(group, place) {
      const isNamed = group.kind === "feature" && group.label !== null;
      const rest = isNamed ? el("span", { class: "index" }, ` #${group.index}`) : null;
      const bar = svg(
        "svg",
        { class: "share-bar", "aria-hidden": "true", focusable: "false" },
        svg("rect", { width: `${Math.min(100, (100 * group.influence) / most)}%`, height: "100%" }),
      );
      const press = () => choose(chosen === place ? null : place);
      return el(
        "button",
        { type: "button", class: `box of-${group.kind}`, "aria-pressed": "false", onclick: press },
        el("b", {}, name(group), rest),
        el("span", { class: "size" }, percent(group.influence)),
        bar,
      );
    }

    function choose(place) {
      chosen = place;
      boxes.forEach((button, other) => button.setAttribute("aria-pressed", String(other === place)));
      draw();
      onChosen(place);
    }

    function joins({ source, target: into }) {
      return source === chosen || (chosen !== null && into === chosen);
    }

    function draw() {
      const shown = chosen === null ? between.slice(0, DRAWN) : edges.filter(joins);
      const near = new Set(shown.flatMap(({ source, target: into }) => [source, into]));
      const isFar = (place) => chosen !== null && place !== chosen && !near.has(place);
      boxes.forEach((button, place) => button.classList.toggle("far", isFar(place)));
      const frameBox = drawing.getBoundingClientRect();
      lines.setAttribute("viewBox", `0 0 ${frameBox.width} ${frameBox.height}`);
      const strongest = shown.length ? shown[0].strength || 1 : 1;
      const paths = shown.map((edge) => path(edge, frameBox, edge.strength / strongest)).reverse();
      replace(lines, paths);
    }

    function path({ source, target: into, weight }, frameBox, share) {
      const from = boxes[source].getBoundingClientRect();
      const to = (into === null ? target : boxes[into]).getBoundingClientRect();
      const [x, y] = [from.left + from.width / 2 - frameBox.left, from.top - frameBox.top];
      const [right, top] = [to.left + to.width / 2 - frameBox.left, to.bottom - frameBox.top];
      const middle = (y + top) / 2;
      return svg("path", {
        class: weight < 0 ? "edge against" : "edge for",
        d: `M${x} ${y}C${x} ${middle} ${right} ${middle} ${right} ${top}`,
        "stroke-width": Math.max(1, WIDEST * share).toFixed(2),
        "stroke-opacity": (0.3 + 0.6 * share).toFixed(2),
      });
    }

    return { choose };
  }

  Vitrine.circuitGraph = { create, strengths, name, targetName };
}
