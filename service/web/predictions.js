"use strict";
/** The labels that were found likeliest; each one that can be explained is a button. */
{
  const NAMED = 10; // labels in a verdict
  const { el, svg, plain, percent } = Vitrine.dom;

  /**
   * @param {Object[]} predictions the API's
   * @param {string} target the label that is explained now
   * @param {function(string): ?function()} onExplain what a label's button does; null: not a button
   * @param {?Object} verdict the API's, of independent scoring
   * @param {?number} count of the labels, if it is known
   * @returns {HTMLElement[]}
   */
  function draw(predictions, target, onExplain, verdict, count) {
    const line = ({ label, probability, logit }) => {
      const explain = onExplain(label);
      const content = [
        el("span", { class: "label" }, label),
        el("span", { class: "share" }, percent(probability)),
        el("span", { class: "logit" }, el("span", { class: "visually-hidden" }, "logit "), plain(logit, 2)),
        share(probability),
      ];
      const button = { type: "button", "data-key": `explain ${label}`, "aria-pressed": String(label === target) };
      const shown = explain ? el("button", { ...button, onclick: explain }, content) : null;
      return el("li", {}, shown ?? el("div", { class: "plain" }, content));
    };
    const head = el(
      "p",
      { class: "prediction-head", "aria-hidden": "true" },
      ["label", "probability", "logit"].map((name) => el("span", {}, name)),
    );
    return [
      verdict && el("p", { class: "verdict" }, judged(verdict)),
      el("div", { class: "predictions" }, head, el("ol", {}, predictions.map(line))),
      el("p", { class: "note" }, verdict ? "Each label is compared with its own threshold." : among(count)),
    ];
  }

  /** What a softmax says, and what it does not. */
  function among(count) {
    if (count === 1) return "Only one label was given: its probability is 100\u202f% for every picture.";
    const labels = count === null ? "the labels" : `these ${count.toLocaleString("en-GB")} labels`;
    return `The best of ${labels}. Their probabilities sum to 100\u202f%, so one comes first even if none fits.`;
  }

  /** Which labels reach their threshold. @param {Object} verdict the API's @returns {string} */
  function judged({ above, none_of_these: none, softmax }) {
    if (!none) return `Labels that reach their threshold: ${above.slice(0, NAMED).join(", ")}${more(above.length - NAMED)}.`;
    const forced = `${softmax.label}, ${percent(softmax.probability)}`;
    return `None of these: no label reaches its threshold. Softmax would give ${forced}.`;
  }

  function more(count) {
    return count > 0 ? ` and ${count} more` : "";
  }

  function share(probability) {
    const bar = svg("rect", { width: `${100 * probability}%`, height: "100%" });
    return svg("svg", { class: "share-bar", "aria-hidden": "true", focusable: "false" }, bar);
  }

  Vitrine.predictions = { draw, judged };
}
