"use strict";
/** The rows of an account with their running totals, and each row's bar. No state, no events. */
{
  const { svg, sum } = Vitrine.dom;

  /**
   * @typedef {Object} Row
   * @property {string} kind prior, attention, clt (or mlp), bias, error, edit, remainder
   * @property {number|null} layer
   * @property {number} value in logits
   * @property {number} start the running total before it
   * @property {number} end and after it
   * @property {?Object} account of such a row: its `LayerAccount`
   */

  /** The account's rows in order, as the API's Explanation has them. @returns {Row[]} */
  function rows(explanation) {
    const { prior, attention, clt, bias, error, edit, remainder } = explanation.ledger;
    const kind = clt.length ? "clt" : "mlp";
    const listed = [
      { kind: "prior", value: prior },
      ...attention.map((value, layer) => ({ kind: "attention", layer, value })),
      ...explanation.layers.map((account, layer) => ({ kind, layer, value: account.contribution, account })),
      { kind: "bias", value: bias },
      ...(clt.length ? [{ kind: "error", value: error }] : []),
      ...(edit ? [{ kind: "edit", value: edit }] : []), // only of an edited network
      { kind: "remainder", value: remainder },
    ];
    return running(listed, 0);
  }

  /** A row's name, given its kind and layer. @returns {string} */
  function name({ kind, layer }) {
    const title = /clt|mlp/.test(kind) ? kind.toUpperCase() : kind[0].toUpperCase() + kind.slice(1);
    return layer === null ? title : `${title} ${layer}`;
  }

  /** A clt row's features and, last, all others of that layer. @returns {Row[]} of kind feature, others */
  function featureRows(row) {
    const features = row.account.features.map((feature) => ({ kind: "feature", feature, value: feature.contribution }));
    const others = { kind: "others", value: row.value - sum(features.map(({ value }) => value)) };
    return running([...features, others], row.start).map((part) => ({ ...part, layer: row.layer }));
  }

  /** The same rows with the running total before and after each, the first one's before it being `from`. */
  function running(listed, from) {
    let total = from;
    return listed.map((row) => {
      const start = total;
      total += row.value;
      return { layer: null, account: null, ...row, start, end: total };
    });
  }

  /**
   * Where logits lie between 0 and 100 (per cent of a bar's width).
   * @param {Row[]} all rows and feature rows that are to fit
   * @returns {{at: function(number): number, ticks: number[]}}
   */
  function scale(all) {
    const points = [0, ...all.flatMap(({ start, end }) => [start, end])];
    const low = Math.min(...points);
    const high = Math.max(...points);
    const room = (high - low || 1) * 0.03;
    const [from, to] = [low - room, high + room];
    const step = niceStep(to - from);
    const ticks = [];
    for (let tick = Math.ceil(from / step); tick * step <= to; tick += 1) ticks.push(tick * step);
    return { at: (value) => (100 * (value - from)) / (to - from), ticks };
  }

  /** 1, 2 or 5 times a power of ten: 3 to 6 ticks. */
  function niceStep(span) {
    const power = 10 ** Math.floor(Math.log10(span / 3));
    return [5, 2, 1].map((factor) => factor * power).find((step) => span / step >= 3) ?? power;
  }

  /**
   * A row's bar, joined to the rows above and below it. Negative rows are hatched: the sign is told without colour.
   * @param {?{start: number, end: number}} row null: the ticks alone
   * @param {{at: function(number): number, ticks: number[]}} axis
   * @param {string} [kind] more class names
   * @returns {SVGElement}
   */
  function bar(row, axis, kind = "") {
    const kindOf = (tick) => (Math.abs(tick) < 1e-9 ? "zero" : "tick");
    const ticks = axis.ticks.map((tick) => upright(axis.at(tick), "0", "100%", kindOf(tick)));
    const drawing = { class: `bar ${kind}`, "aria-hidden": "true", focusable: "false" };
    return svg("svg", drawing, ticks, row && block(row, axis));
  }

  function block(row, axis) {
    const [from, to] = [axis.at(row.start), axis.at(row.end)];
    const against = row.end < row.start;
    const x = `${Math.min(from, to)}%`;
    const box = { x, width: `${Math.abs(to - from)}%`, y: "20%", height: "60%" };
    return [
      upright(from, "0", "20%", "join"),
      upright(to, "80%", "100%", "join"),
      svg("rect", { ...box, class: against ? "against" : "for" }),
      against && svg("rect", { ...box, fill: "url(#vitrine-hatch)" }),
      upright(to, "20%", "80%", "end"),
    ];
  }

  function upright(percent, from, to, kind) {
    return svg("line", { x1: `${percent}%`, x2: `${percent}%`, y1: from, y2: to, class: kind });
  }

  /** The ticks' numbers. @returns {SVGElement} */
  function ruler(axis) {
    const text = (tick) => String(Number(tick.toPrecision(2))).replace("-", "−");
    const numbers = axis.ticks.map((tick) =>
      svg("text", { x: `${axis.at(tick)}%`, y: "75%", "text-anchor": "middle" }, text(tick)),
    );
    return svg("svg", { class: "ruler", "aria-hidden": "true", focusable: "false" }, numbers);
  }

  /** The hatching, once a page. @returns {SVGElement} */
  function hatching() {
    const size = { width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" };
    const stroke = svg("line", { x1: 0, y1: 0, x2: 0, y2: 5, class: "hatch" });
    const pattern = svg("pattern", { id: "vitrine-hatch", ...size }, stroke);
    return svg("svg", { class: "patterns", "aria-hidden": "true", width: 0, height: 0 }, svg("defs", {}, pattern));
  }

  Vitrine.waterfall = { rows, name, featureRows, running, scale, bar, ruler, hatching };
}
