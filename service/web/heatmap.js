"use strict";
/** A map of the photo's patches as a picture, a legend and a table. No state, no events. */
{
  const { el, svg, signed, scroller } = Vitrine.dom;

  /**
   * The part of an upright photo that the model sees, in the photo's pixels: `to_pixels` of service/engine/images.py, undone.
   * @param {number} width of the photo
   * @param {number} height
   * @param {{size: number[], resize_mode: string}} preprocessing the manifest's; size is [height, width]
   * @returns {{x: number, y: number, width: number, height: number}}
   */
  function seen(width, height, { size, resize_mode: mode }) {
    if (mode === "squash") return { x: 0, y: 0, width, height };
    const [side] = size; // "shortest" is for square sizes alone
    const long = Math.trunc((side * Math.max(width, height)) / Math.min(width, height));
    const [resizedWidth, resizedHeight] = width <= height ? [side, long] : [long, side];
    const [scaleX, scaleY] = [width / resizedWidth, height / resizedHeight];
    return {
      x: halfToEven((resizedWidth - side) / 2) * scaleX,
      y: halfToEven((resizedHeight - side) / 2) * scaleY,
      width: side * scaleX,
      height: side * scaleY,
    };
  }

  /** Python's round(), for numbers that are not negative. */
  function halfToEven(value) {
    const floor = Math.floor(value);
    return value - floor === 0.5 ? floor + (floor % 2) : Math.round(value);
  }

  /** @param {PhotoMap} map @returns {number} the value that is drawn in full, on either side of zero */
  function largest({ values, least }) {
    return Math.max(least, ...values.map(Math.abs)) || 1;
  }

  /**
   * The map, to be laid over a photo of width x height pixels. Zero is transparent, on both sides alike.
   * @param {PhotoMap} map of `Vitrine.maps`
   * @param {{sign: string, opacity: number, patch: ?number}} view sign: both, for, against
   * @param {{width: number, height: number, seen: Object}} photo
   * @returns {SVGElement}
   */
  function overlay(map, view, photo) {
    const full = largest(map);
    const patch = { width: photo.seen.width / map.columns, height: photo.seen.height / map.rows };
    const box = (index) => ({
      x: photo.seen.x + (index % map.columns) * patch.width,
      y: photo.seen.y + Math.floor(index / map.columns) * patch.height,
      ...patch,
    });
    const hatch = "vitrine-map-hatch";
    const shown = map.values.map((value, index) => {
      if (view.sign === (value < 0 ? "for" : "against")) return null;
      const kind = value < 0 ? "against" : "for";
      const fill = value < 0 ? { fill: `url(#${hatch})` } : {};
      const alpha = (view.opacity * Math.abs(value)) / full;
      return svg("rect", { ...box(index), ...fill, class: `patch ${kind}`, "fill-opacity": alpha.toFixed(4) });
    });
    return svg(
      "svg",
      {
        class: "overlay",
        viewBox: `0 0 ${photo.width} ${photo.height}`,
        preserveAspectRatio: "none",
        "aria-hidden": "true",
        focusable: "false",
      },
      svg("defs", {}, pattern(hatch, Math.min(patch.width, patch.height) / 4)),
      svg("path", { class: "unseen", "fill-rule": "evenodd", d: outline(photo) }),
      shown,
      map.outliers.map((index) => outlier(box(index))),
      view.patch !== null && [
        svg("rect", { ...box(view.patch), class: "cursor under" }),
        svg("rect", { ...box(view.patch), class: "cursor" }),
      ],
    );
  }

  /** Stripes, by which what speaks against is told without colour. size: of one stripe and one gap, in user units. */
  function pattern(id, size) {
    return svg(
      "pattern",
      { id, width: size, height: size, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      svg("rect", { width: size, height: size, class: "stripe light" }),
      svg("rect", { width: size / 2, height: size, class: "stripe dark" }),
    );
  }

  function outline({ width, height, seen: { x, y, width: w, height: h } }) {
    return `M0 0H${width}V${height}H0z M${x} ${y}h${w}v${h}h${-w}z`;
  }

  function outlier({ x, y, width, height }) {
    const circle = { cx: x + width / 2, cy: y + height / 2, r: Math.min(width, height) / 5 };
    return [svg("circle", { ...circle, class: "outlier under" }), svg("circle", { ...circle, class: "outlier" })];
  }

  /** The scale, the same on both sides of zero, in logits. @returns {HTMLElement} */
  function legend(map, view) {
    const full = largest(map);
    const steps = 9;
    const hatch = "vitrine-legend-hatch";
    const step = (index) => {
      const share = (index - steps) / steps;
      const kind = share < 0 ? "against" : "for";
      if (share !== 0 && view.sign !== "both" && view.sign !== kind) return null;
      const fill = share < 0 ? { fill: `url(#${hatch})` } : {};
      const place = { x: index * 12, y: 0, width: 12, height: 12 };
      return svg("rect", { ...place, ...fill, class: `patch ${kind}`, "fill-opacity": Math.abs(share) * view.opacity });
    };
    const width = (2 * steps + 1) * 12;
    const strip = svg(
      "svg",
      { viewBox: `0 0 ${width} 12`, preserveAspectRatio: "none", "aria-hidden": "true", focusable: "false" },
      svg("defs", {}, pattern(hatch, 5)),
      Array.from({ length: 2 * steps + 1 }, (_, index) => step(index)),
    );
    const ends = [signed(-full), "0", signed(full)].map((text) => el("span", {}, text));
    const sides = ["against (striped)", "logits per patch", "for (solid)"].map((text) => el("span", {}, text));
    return el("div", { class: "legend" }, strip, el("div", {}, ends), el("div", {}, sides));
  }

  /** Every patch's value, with its sign; outliers are starred. @returns {HTMLElement} */
  function table(map) {
    const columns = Array.from({ length: map.columns }, (_, column) => el("th", { scope: "col" }, String(column + 1)));
    const line = (_, row) => {
      const cells = map.values.slice(row * map.columns, (row + 1) * map.columns).map((value, column) => {
        const star = map.outliers.includes(row * map.columns + column) ? "*" : "";
        return el("td", {}, signed(value) + star);
      });
      return el("tr", {}, el("th", { scope: "row" }, String(row + 1)), cells);
    };
    const corner = el("td", {});
    return scroller(
      "Patch values",
      el(
        "table",
        { class: "patches" },
        el("caption", { class: "visually-hidden" }, `${map.title}: logits of each patch of the photo; * marks outliers`),
        el("thead", {}, el("tr", {}, corner, columns)),
        el("tbody", {}, Array.from({ length: map.rows }, line)),
      ),
    );
  }

  Vitrine.heatmap = { seen, overlay, legend, table };
}
