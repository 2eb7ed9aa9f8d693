"use strict";
/** The reference images whose features are most like this photo's, layer by layer, the last ones first. */
{
  const SHOWN = 2; // layers at once
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
        el("span", {}, plain(found.similarity, 2)),
        el("details", {}, el("summary", {}, "File"), file(found)),
      );
    const layer = (found) =>
      el(
        "li",
        {},
        el("h3", {}, `Layer ${found.layer}`),
        found.images.length ? el("ol", { class: "neighbours" }, found.images.map(image)) : el("p", {}, "none"),
      );
    const list = (some) => el("ul", { class: "similar" }, some.map(layer));
    const layers = answer.layers.toReversed();
    return [
      el(
        "p",
        { class: "note" },
        `Of ${answer.references.toLocaleString("en-GB")} reference images, those with the most similar active features ` +
          "(by cosine), most similar first.",
      ),
      list(layers.slice(0, SHOWN)),
      layers.length > SHOWN && el("details", {}, el("summary", {}, "Earlier layers"), list(layers.slice(SHOWN))),
    ];
  }

  Vitrine.similar = { draw };
}
