"use strict";
/** Where an answer's time went: one stacked bar, and the same as a table. */
{
  const { el, svg, plain, sum } = Vitrine.dom;
  const STAGES = {
    decode: "reading the image",
    labels: "embedding the labels",
    queue: "waiting for the graph",
    inference: "running the graph: the prediction and its parts",
    ledger: "computing the account",
    sources: "following the logit back to features",
  };

  /**
   * @param {Object<string, number>} timings milliseconds by stage, the API's
   * @param {?number} seen milliseconds from sending the request to its answer, if they were measured
   * @returns {HTMLElement[]}
   */
  function draw(timings, seen) {
    const stages = Object.entries(timings);
    const total = sum(stages.map(([, ms]) => ms));
    let from = 0;
    const parts = stages.map(([, ms], index) => {
      const x = from;
      from += total ? (100 * ms) / total : 0;
      return svg("rect", { x: `${x}%`, width: `${from - x}%`, height: "100%", class: `stage s${index % 7}` });
    });
    const line = ([stage, ms], index) =>
      el(
        "tr",
        {},
        el("th", { scope: "row" }, el("span", { class: `swatch stage s${index % 7}` }), stage),
        el("td", { class: "note" }, STAGES[stage] ?? ""),
        el("td", { class: "value" }, plain(ms, 1)),
      );
    const network = seen === null ? "" : ` With the network, the request took ${plain(seen, 0)} ms.`;
    return [
      el("p", {}, `The service took ${plain(total, 1)} ms.${network}`),
      svg("svg", { class: "stages", "aria-hidden": "true", focusable: "false" }, parts),
      el(
        "table",
        { class: "timings" },
        el("caption", { class: "visually-hidden" }, "Milliseconds by stage"),
        el(
          "thead",
          { class: "visually-hidden" },
          el("tr", {}, ["Stage", "What it is", "Milliseconds"].map((name) => el("th", { scope: "col" }, name))),
        ),
        el("tbody", {}, stages.map(line)),
        el(
          "tfoot",
          {},
          el(
            "tr",
            {},
            el("th", { scope: "row", colspan: "2" }, "total, ms"),
            el("td", { class: "value" }, plain(total, 1)),
          ),
        ),
      ),
    ];
  }

  Vitrine.timings = { draw };
}
