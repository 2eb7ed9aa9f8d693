"use strict";
/** What is known of one feature, drawn from the API's CardResponse. No state; its buttons do what they are given. */
{
  const { el, plain, percent, hint, scroller } = Vitrine.dom;
  const { masked, histogram } = Vitrine.cardFigures;

  const ABSTAINED = {
    too_few_exemplars: "it fires on too few images for that, or on nearly all.",
    score: "no word tells well enough on which images it fires.",
    clarity: "the images on which it fires most do not show one thing.",
    margin: "two words fit its images about as well as each other.",
  };
  const MEANING = {
    score:
      "The chance that, of two images, one on which the feature fires and one on which it does not, the first fits the " +
      "label better: 1 is always, 0.5 is a guess. On the images by which the label was chosen.",
    margin: "How much better that word tells than the second-best one. Near 0, another word would do as well.",
    clarity: "Mean cosine between any two of its top images: how far they show the same thing.",
    auroc: "The same as the score, on images kept apart: this is what the label is worth.",
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
    return ["What it fires on could not be said: ", ABSTAINED[abstained] ?? abstained ?? "it was not looked into."];
  }

  function confidence({ label_auroc: auroc }) {
    if (auroc === null) return "How sure: not tested, since it fires on too few or too many of the images kept apart.";
    if (auroc >= 0.9) return "How sure: confident. The label tells very well on which other images it fires.";
    if (auroc >= 0.8) return "How sure: fairly. The label tells on which other images it fires, with exceptions.";
    return "How sure: doubtful. The label hardly tells on which other images it fires.";
  }

  function number(title, value, meaning) {
    const { button, text } = hint(title, `${title}. ${meaning}`);
    const item = el("div", {}, el("dt", {}, title, " ", button), el("dd", {}, value === null ? "–" : plain(value, 2)));
    return { item, meaning: text };
  }

  function written({ label, score, margin }) {
    const { button, text } = hint(
      "writes",
      "The word that the feature's direction adds most to, whatever it fires on: what it argues for, not what it sees.",
    );
    const numbers = ` (score ${plain(score, 2)}, margin ${plain(margin, 2)}) `;
    return el("div", { class: "written" }, el("p", {}, "Writes ", el("em", {}, label), numbers, button), text);
  }

  function exemplars(card) {
    if (card.exemplars.length === 0) return el("p", {}, "It fired on none of the images that were looked at.");
    const list = el("ul", { class: "exemplars" }, card.exemplars.map((one) => el("li", {}, masked(one, card))));
    const darken = { type: "checkbox", onchange: ({ target }) => list.classList.toggle("darkened", target.checked) };
    const note = card.exemplars.some(({ thumbnail }) => thumbnail !== null)
      ? el("label", {}, el("input", darken), " Darken them where it does not fire")
      : el("p", { class: "note" }, "The bluer, the more it fires there. The images did not come with the model.");
    return el("section", {}, el("h3", {}, "Where it fires most"), note, list);
  }

  function meanPicture(card) {
    const picture = { class: "mean", src: card.mean_picture, alt: "The mean of the images on which it fires most" };
    return el(
      "section",
      {},
      el("h3", {}, "The mean of those images"),
      el("p", { class: "note" }, "One picture made of all of them; none of them can be seen in it."),
      el("img", picture),
    );
  }

  function activations(card) {
    const { cls, patches } = card.frequency;
    const often = `It fires at the class token on ${percent(cls, 2)} of images, on ${percent(patches, 2)} of patches.`;
    const below = ([share, value]) => `${percent(Number(share), 0)} below ${plain(value, 2)}`;
    const quantiles = Object.entries(card.quantiles).map(below).join(", ");
    const read = { cls: "at the class token", patches: "at the patches, for it hardly fires at the class token" };
    return el(
      "section",
      {},
      el("h3", {}, "How often, how strongly"),
      el("p", {}, often),
      card.histogram && histogram(card.histogram),
      el("p", { class: "note" }, `Read ${read[card.read_at]}.`, quantiles && ` Where it fires: ${quantiles}.`),
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
      el("th", { scope: "col", class: "value" }, "Images shared"),
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
