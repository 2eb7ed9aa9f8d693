"use strict";
/** What is known of one feature, drawn from the API's CardResponse. No state; its buttons do what they are given. */
{
  const { el, plain, percent, hint, scroller } = Vitrine.dom;
  const { masked, histogram } = Vitrine.cardFigures;

  const ABSTAINED = {
    too_few_exemplars: "the feature fires on too few images, or on nearly all of them.",
    score: "no word predicts well enough on which images the feature fires.",
    clarity: "the images on which the feature fires most do not show the same thing.",
    margin: "two words fit its images about equally well.",
  };
  const MEANING = {
    score:
      "Of two images, the feature fires on one and not on the other: the probability that the label fits the first one " +
      "better. 1 is always, 0.5 is chance. Measured on the images that were used to choose the label.",
    margin: "How much better the score of this word is than that of the second-best one. Near 0, both fit equally well.",
    clarity: "Mean cosine between pairs of its top images: how far they show the same thing.",
    auroc: "The same as the score, on held-out images: it shows how reliable the label is.",
  };

  /**
   * @param {Object} card the API's CardResponse
   * @param {Object} options
   * @param {function(number, number)} options.onCard opens the card of (layer, index)
   * @param {function(number, number): boolean} options.hasCard whether there is one
   * @param {?function(string)} options.onLabel lists other features of that label
   * @returns {HTMLElement[]}
   */
  function draw(card, options) {
    return [
      reading(card, options),
      exemplars(card),
      card.mean_picture && meanPicture(card),
      activations(card),
      card.coactive.length > 0 && coactive(card, options),
    ].filter(Boolean);
  }

  /** @param {{label: ?string, index: number}} card @returns {string} what a feature is called */
  function name(card) {
    return card.label ?? `#${card.index}`;
  }

  function reading(card, { onLabel }) {
    const numbers = [
      ["score", "Score", card.label_score],
      ["margin", "Margin", card.label_margin],
      ["clarity", "Clarity", card.label_clarity],
      ["auroc", "Held-out AUROC", card.label_auroc],
    ];
    const measured = numbers.map(([key, title, value]) => number(title, value, MEANING[key]));
    return el(
      "section",
      {},
      el("p", { class: "confidence" }, card.label === null ? unlabelled(card) : confidence(card)),
      el("dl", { class: "measured" }, measured.map(({ item }) => item)),
      measured.map(({ meaning }) => meaning),
      card.writes && written(card.writes),
      card.label !== null && onLabel && el("p", {}, others(card.label, onLabel)),
    );
  }

  function others(label, onLabel) {
    const press = { type: "button", class: "link", onclick: () => onLabel(label) };
    return el("button", press, `Other features labelled “${label}”`);
  }

  function unlabelled({ abstained }) {
    return ["No label: ", ABSTAINED[abstained] ?? abstained ?? "the feature was not examined."];
  }

  function confidence({ label_auroc: auroc }) {
    if (auroc === null) return "Confidence: not tested, because it fires on too few or too many of the held-out images.";
    if (auroc >= 0.9) return "Confidence: high. The label predicts very well on which other images it fires.";
    if (auroc >= 0.8) return "Confidence: fair. The label predicts on which other images it fires, with exceptions.";
    return "Confidence: low. The label hardly predicts on which other images it fires.";
  }

  function number(title, value, meaning) {
    const { button, text } = hint(title, `${title}. ${meaning}`);
    const item = el("div", {}, el("dt", {}, title, " ", button), el("dd", {}, value === null ? "–" : plain(value, 2)));
    return { item, meaning: text };
  }

  function written({ label, score, margin }) {
    const { button, text } = hint(
      "the word that it writes",
      "The word that the feature's direction supports most. It may differ from what the feature fires on.",
    );
    const numbers = ` (score ${plain(score, 2)}, margin ${plain(margin, 2)}) `;
    return el("div", { class: "written" }, el("p", {}, "Writes ", el("em", {}, label), numbers, button), text);
  }

  function exemplars(card) {
    if (card.exemplars.length === 0) return el("p", {}, "It fired on none of the images examined.");
    const list = el("ul", { class: "exemplars" }, card.exemplars.map((one) => el("li", {}, masked(one, card))));
    const darken = { type: "checkbox", onchange: ({ target }) => list.classList.toggle("darkened", target.checked) };
    const note = card.exemplars.some(({ thumbnail }) => thumbnail !== null)
      ? el("label", {}, el("input", darken), " Darken them where it does not fire")
      : el("p", { class: "note" }, "A deeper blue means that it fires more strongly there. The bundle has no pictures.");
    return el("section", {}, el("h3", {}, "Where it fires most"), note, list);
  }

  function meanPicture(card) {
    const picture = { class: "mean", src: card.mean_picture, alt: "The mean of the images on which it fires most" };
    return el(
      "section",
      {},
      el("h3", {}, "The mean of those images"),
      el("p", { class: "note" }, "The average of all of them; no single image can be recognised in it."),
      el("img", picture),
    );
  }

  function activations(card) {
    const { cls, patches } = card.frequency;
    const often = `It fires at the class token of ${percent(cls, 2)} of images and at ${percent(patches, 2)} of patches.`;
    const below = ([share, value]) => `${percent(Number(share), 0)} below ${plain(value, 2)}`;
    const quantiles = Object.entries(card.quantiles).map(below).join(", ");
    const read = { cls: "at the class token", patches: "at the patches, because it hardly fires at the class token" };
    return el(
      "section",
      {},
      el("h3", {}, "How often, how strongly"),
      el("p", {}, often),
      card.histogram && histogram(card.histogram),
      el("p", { class: "note" }, `Measured ${read[card.read_at]}.`, quantiles && ` Where it fires: ${quantiles}.`),
    );
  }

  function coactive(card, { onCard, hasCard }) {
    const line = (other) => {
      const text = [name(other), el("span", { class: "index" }, ` layer ${other.layer} #${other.index}`)];
      const press = { type: "button", class: "link", onclick: () => onCard(other.layer, other.index) };
      const shown = hasCard(other.layer, other.index) ? el("button", press, text) : text;
      const share = el("td", { class: "value" }, percent(other.jaccard, 0));
      return el("tr", {}, el("th", { scope: "row" }, shown), share);
    };
    const columns = [
      el("th", { scope: "col" }, "Feature"),
      el("th", { scope: "col", class: "value" }, "Shared images"),
    ];
    return el(
      "section",
      {},
      el("h3", {}, "Fires together with"),
      scroller(
        "Features that fire together with it",
        el(
          "table",
          { class: "list" },
          el("thead", {}, el("tr", {}, columns)),
          el("tbody", {}, card.coactive.map(line)),
        ),
      ),
    );
  }

  Vitrine.card = { draw, name };
}
