"use strict";
/** The reference images whose features are most like this photo's, layer by layer. */
{
  const { el, plain } = Vitrine.dom;
  const { picture, file } = Vitrine.cardFigures;

  /** @param {Object} answer the API's SimilarResponse @returns {HTMLElement[]} */
  function draw(answer) {
    const image = (found) =>
      el(
        "li",
        {},
        picture(found),
        el("b", {}, found.class_name),
        file(found),
        el("span", {}, plain(found.similarity, 2)),
      );
    const layer = (found) =>
      el(
        "li",
        {},
        el("h3", {}, `Layer ${found.layer}`),
        found.images.length ? el("ol", { class: "neighbours" }, found.images.map(image)) : el("p", {}, "none"),
      );
    return [
      el(
        "p",
        { class: "note" },
        `Of ${answer.references.toLocaleString("en-GB")} reference images, those whose active features are nearest ` +
          "(by cosine), nearest first.",
      ),
      el("ol", { class: "similar" }, answer.layers.map(layer)),
    ];
  }

  Vitrine.similar = { draw };
}
