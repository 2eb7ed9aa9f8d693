"use strict";
/** What the residual SAEs read in the stream after each block: their features at the class token and at patches. */
{
  const { el, plain, scroller } = Vitrine.dom;
  const NOTE =
    "After each layer an autoencoder splits the residual stream into features. The most active ones come first, with " +
    "their activation. For features at patches, the small picture shows where they fire.";

  /**
   * @param {Object} residual the API's ResidualFeatures
   * @param {Object} options
   * @param {function(number, number, string)} options.onCard opens the card of (layer, index, dictionary)
   * @param {function(number, number, string): boolean} options.hasCard whether there is one
   * @returns {HTMLElement[]}
   */
  function draw({ layers, rows, columns }, options) {
    const head = ["Layer", "At the class token", "At patches"].map((text) => el("th", { scope: "col" }, text));
    const line = ({ layer, cls, patches }) =>
      el(
        "tr",
        {},
        el("th", { scope: "row" }, String(layer)),
        el("td", {}, el("ul", { class: "read" }, cls.map((feature) => el("li", {}, named(feature, layer, options))))),
        el(
          "td",
          {},
          el(
            "ul",
            { class: "read" },
            patches.map((feature) => el("li", {}, where(feature, rows, columns), named(feature, layer, options))),
          ),
        ),
      );
    const table = el("table", { class: "list" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, layers.map(line)));
    return [el("p", { class: "note" }, NOTE), scroller("Features of the residual stream", table)];
  }

  function named({ index, activation, label }, layer, { onCard, hasCard }) {
    const name = `${label ?? ""} #${index}`.trim();
    const press = { type: "button", class: "link", onclick: () => onCard(layer, index, "residual") };
    return [hasCard(layer, index, "residual") ? el("button", press, name) : name, ` ${plain(activation, 1)}`];
  }

  function where({ tokens, activation }, rows, columns) {
    const place = tokens.indexOf(activation);
    const said = `strongest in row ${Math.floor(place / columns) + 1}, column ${(place % columns) + 1}`;
    const picture = el("canvas", { width: columns, height: rows, role: "img", "aria-label": said, title: said });
    const drawing = picture.getContext("2d");
    tokens.forEach((value, token) => {
      drawing.fillStyle = `rgba(31, 119, 220, ${Math.min(1, Math.abs(value / activation))})`;
      drawing.fillRect(token % columns, Math.floor(token / columns), 1, 1);
    });
    return picture;
  }

  Vitrine.residual = { draw };
}
