"use strict";
/** The pictures on a feature's card: an image with the patches it fires on, and a histogram with its table. */
{
  const { el, svg, plain, scroller } = Vitrine.dom;

  /**
   * An image, which grows when it is pressed, and what darkens it where the feature does not fire; without a thumbnail,
   * the grid of patches alone.
   * @param {Object} exemplar the API's Exemplar
   * @param {{rows: number, columns: number}} grid of patches
   * @returns {HTMLElement}
   */
  function masked(exemplar, { rows, columns }) {
    const most = Math.max(...exemplar.mask);
    const where = most > 0 ? place(exemplar.mask.indexOf(most), columns) : "fires only at the class token";
    const thumbnail = picture(exemplar);
    const patches = most > 0 && grid(exemplar.mask, most, rows, columns, Boolean(thumbnail));
    return el(
      "figure",
      { class: thumbnail ? "exemplar" : "exemplar bare" },
      (thumbnail && larger(exemplar, [thumbnail, patches])) || (patches && el("div", { class: "stack" }, patches)),
      el(
        "figcaption",
        {},
        el("b", {}, exemplar.class_name),
        file(exemplar),
        el("span", {}, `activation ${plain(exemplar.activation, 2)}`),
        el("span", { class: "note" }, where),
      ),
    );
  }

  /** A button that shows its picture larger, and as it was. */
  function larger({ class_name: kind, name }, picture) {
    const press = { type: "button", class: "stack", "aria-pressed": "false", "aria-label": `Enlarge: ${kind}, ${name}` };
    const button = el("button", { ...press, title: "Enlarge", onclick: () => grow() }, picture);
    const grow = () => {
      const large = button.closest("li").classList.toggle("large");
      button.setAttribute("aria-pressed", String(large));
    };
    return button;
  }

  function place(patch, columns) {
    return `strongest at row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;
  }

  /** The thumbnail of an image that the bundle names, if it brought one along. @returns {?HTMLElement} */
  function picture({ thumbnail, name, class_name: kind }) {
    return thumbnail === null ? null : el("img", { src: thumbnail, alt: `${kind}, ${name}`, class: "pixels" });
  }

  /** An image's name, which may break after slashes. @returns {HTMLElement} */
  function file({ name }) {
    const parts = name.split(/(?<=\/)/).flatMap((part) => [part, el("wbr")]);
    return el("span", { class: "file" }, parts);
  }

  function grid(mask, most, rows, columns, over) {
    const patches = mask.map((value, index) => {
      const box = { x: index % columns, y: Math.floor(index / columns), width: 1, height: 1 };
      return svg("rect", { ...box, "fill-opacity": (over ? 0.8 * (1 - value / most) : value / most).toFixed(3) });
    });
    const frame = { viewBox: `0 0 ${columns} ${rows}`, preserveAspectRatio: "none", focusable: "false" };
    return svg("svg", { ...frame, class: over ? "mask shade" : "mask", "aria-hidden": "true" }, patches);
  }

  /**
   * How many images a feature fires on, by how strongly. @param {Object} data the API's Histogram
   * @returns {HTMLElement}
   */
  function histogram({ edges, counts }) {
    const most = Math.max(...counts) || 1;
    const width = 100 / counts.length;
    const bars = counts.map((count, bin) => {
      const height = (100 * count) / most;
      const across = { x: `${bin * width}%`, width: `${width * 0.9}%` };
      return svg("rect", { ...across, y: `${100 - height}%`, height: `${height}%` });
    });
    const ends = [plain(edges[0], 1), "|activation|", plain(edges.at(-1), 1)];
    const line = (count, bin) =>
      el(
        "tr",
        {},
        el("th", { scope: "row" }, `${plain(edges[bin], 2)} to ${plain(edges[bin + 1], 2)}`),
        el("td", { class: "value" }, String(count)),
      );
    const table = el(
      "table",
      { class: "list" },
      el("thead", {}, el("tr", {}, ["|activation|", "Images"].map((text) => el("th", { scope: "col" }, text)))),
      el("tbody", {}, counts.map(line)),
    );
    return el(
      "figure",
      { class: "histogram" },
      svg("svg", { "aria-hidden": "true", focusable: "false" }, bars),
      el("div", { class: "ends" }, ends.map((text) => el("span", {}, text))),
      el("details", {}, el("summary", {}, "Histogram as a table"), scroller("Histogram of activations", table)),
    );
  }

  Vitrine.cardFigures = { masked, picture, file, histogram };
}
