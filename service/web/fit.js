"use strict";
/** Whether another label fits better: by the same picture's cosines with the bundle's own labels. */
{
  const { el, plain } = Vitrine.dom;

  /**
   * @param {Object[]} predictions the API's, by labels of the user's
   * @param {Object[]} own the same picture's, by all of the bundle's own labels
   * @param {function()} onOwn asks with those
   * @returns {?HTMLElement} null where none of those fits better
   */
  function draw(predictions, own, onOwn) {
    const highest = (all) => all.reduce((one, other) => (other.cosine > one.cosine ? other : one));
    const [best, other] = [predictions, own].map(highest);
    const better = own.filter(({ cosine }) => cosine > best.cosine && cosine - best.cosine > 1e-6).length;
    if (!better) return null;
    const nearer = better === 1 ? "one is" : `${better.toLocaleString("en-GB")} are`;
    const total = own.length.toLocaleString("en-GB");
    const cosines = `cosine ${plain(other.cosine, 2)}, compared with ${plain(best.cosine, 2)} for ${best.label}`;
    return el(
      "p",
      { class: "note fit" },
      `Another label may fit better: of the bundle's own ${total} labels, ${nearer} closer to this picture${better === 1 ? ": " : ", closest "}`,
      `${other.label} (${cosines}). `,
      el("button", { type: "button", class: "link", onclick: onOwn }, "Use those labels"),
    );
  }

  Vitrine.fit = { draw };
}
