"use strict";
/** The labels that were found likeliest; each one that can be explained is a button. */
{
  const { el, svg, plain, percent } = Vitrine.dom;

  /**
   * @param {Object[]} predictions the API's
   * @param {string} target the label that is explained now
   * @param {function(string): ?function()} onExplain what a label's button does; null: it is no button
   * @returns {HTMLElement}
   */
  function draw(predictions, target, onExplain) {
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
    return el("div", { class: "predictions" }, head, el("ol", {}, predictions.map(line)));
  }

  function share(probability) {
    const bar = svg("rect", { width: `${100 * probability}%`, height: "100%" });
    return svg("svg", { class: "share-bar", "aria-hidden": "true", focusable: "false" }, bar);
  }

  Vitrine.predictions = { draw };
}
