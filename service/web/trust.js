"use strict";
/** How far to trust an account, in words: what the fidelity's numbers mean, and from where on they are good or fair. */
{
  const { el, plain, percent } = Vitrine.dom;
  const LEVELS = ["good", "fair", "poor"];
  const MARK = { good: "●", fair: "◐", poor: "○" };

  const MEASURES = [
    {
      name: "R²",
      key: "r2",
      bounds: [0.9, 0.6],
      say: (value) => plain(value),
      rule: "good from 0.9, fair from 0.6",
      meaning:
        "How much of what the MLPs add to this image's embedding the features reproduce. 1 is all of it; below 0 is " +
        "worse than using the average image's.",
    },
    {
      name: "Cosine",
      key: "cosine",
      bounds: [0.95, 0.8],
      say: (value) => plain(value),
      rule: "good from 0.95, fair from 0.8",
      meaning: "How well the direction of what the features add matches that of what the MLPs add. 1 is the same.",
    },
    {
      name: "Error row",
      key: "error_share",
      bounds: [-0.05, -0.15],
      say: (value) => percent(value),
      rule: "good up to 5 %, fair up to 15 %",
      meaning: "The share of the top label's account that no feature explains, with all rows counted without their signs.",
    },
    {
      name: "Top label without the error row",
      key: "reconstructed_top1_agrees",
      bounds: [1, 1],
      say: (value) => (value ? "stays" : "changes"),
      rule: "good if it stays, poor if it changes",
      meaning: "Whether the prediction would be the same with only the features.",
    },
  ];

  const VERDICT = {
    good: "Good: on this image the features represent almost all that the MLPs did. Rely on them as on the sums.",
    fair: "Fair: the features miss part of what the MLPs did here. Rely on the layers' rows more than on single features.",
    poor: "Poor: the features miss too much of what the MLPs did here. Rely on the attention rows, not on the features.",
  };

  /** @param {Object} measure of `MEASURES` @param {Object} fidelity the API's @returns {string} good, fair or poor */
  function level({ key, bounds }, fidelity) {
    const value = Number(fidelity[key]) * (key === "error_share" ? -1 : 1);
    return value >= bounds[0] ? "good" : value >= bounds[1] ? "fair" : "poor";
  }

  /** @param {Object} fidelity the API's @returns {string} the worst of the four */
  function overall(fidelity) {
    return LEVELS.findLast((name) => MEASURES.some((measure) => level(measure, fidelity) === name));
  }

  /** @param {?Object} fidelity the API's @returns {HTMLElement[]} */
  function draw(fidelity) {
    if (!fidelity) return [el("p", {}, "There are no features (no CLT): the rows show the MLPs themselves, exactly.")];
    const verdict = overall(fidelity);
    const line = (measure) => {
      const found = level(measure, fidelity);
      return el(
        "div",
        { class: `measure ${found}`, "data-measure": measure.key },
        el("dt", {}, measure.name),
        el(
          "dd",
          {},
          el("strong", {}, measure.say(fidelity[measure.key])),
          " ",
          el("span", { class: "level" }, mark(found), found),
          el("p", {}, `${measure.meaning} Rating: ${measure.rule}.`),
        ),
      );
    };
    return [
      el("p", { class: `verdict ${verdict}` }, mark(verdict), VERDICT[verdict]),
      el("dl", { class: "measures" }, MEASURES.map(line)),
      el(
        "p",
        { class: "note" },
        "The rows add up to the logit whatever these numbers are. None of the numbers says that the prediction is right.",
      ),
    ];
  }

  function mark(found) {
    return el("span", { class: "mark", "aria-hidden": "true" }, MARK[found]);
  }

  Vitrine.trust = { draw, overall };
}
