"use strict";
/** The photo under its heat map: how it is looked at, by mouse, finger or arrow keys, and what is read from it. */
{
  const { el, replace, signed } = Vitrine.dom;
  const { seen, values, overlay, legend, addition, table } = Vitrine.heatmap;
  const HELP = "Point at a patch, or go to the map and use the arrow keys, to read its value.";
  const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

  /**
   * @param {HTMLElement} frame gets the photo and the map
   * @param {HTMLElement} panel gets the map's controls
   * @returns {{load: function(string): Promise<boolean>, show: function(?Object, ?Object): boolean,
   *   layer: function(number)}}
   *   load: another photo, by its URL; resolves to whether it can be shown; show: the map of an explanation,
   *   with the manifest's preprocessing; whether there is one; layer: that layer's attention
   */
  function create(frame, panel) {
    const view = { layer: null, sign: "both", opacity: 0.75, patch: null };
    let explanation = null;
    let preprocessing = null;

    const image = el("img", { alt: "The photo that was asked about" });
    const drawn = el("div", { class: "layer" });
    const map = el("div", {
      class: "map",
      tabindex: "0",
      role: "application",
      "aria-roledescription": "heat map",
      onkeydown: step,
      onpointerdown: point,
      onpointermove: point,
      onfocus: () => pick(view.patch ?? 0),
    });
    const photo = el("div", { class: "photo" }, image, drawn, map);
    const readout = el("p", { class: "readout", "aria-live": "polite" }, HELP);
    const layers = el("select", { onchange: () => chooseLayer(layers.value) });
    const signs = ["both", "for", "against"].map(signChoice);
    const slider = el("input", { type: "range", min: 0, max: 100, value: 100 * view.opacity, oninput: fade });
    const scale = el("div", {});
    const adds = el("div", {});
    const numbers = el("div", {});
    const outliers = el("p", { class: "note" }, "Circles mark outlier patches: their place in the photo means little.");
    panel.append(
      el("h3", {}, "Where attention read"),
      readout,
      scale,
      el(
        "div",
        { class: "controls" },
        el("label", {}, "Layer ", layers),
        el("fieldset", { class: "signs" }, el("legend", { class: "visually-hidden" }, "Which sign to show"), signs),
        el("label", { class: "slider" }, "Opacity ", slider),
      ),
      adds,
      outliers,
      el("details", {}, el("summary", {}, "Patch values as a table"), numbers),
    );
    frame.append(photo);
    panel.hidden = photo.hidden = true;

    function signChoice(sign) {
      const radio = { type: "radio", name: "vitrine-sign", value: sign, checked: sign === view.sign };
      const choose = () => {
        view.sign = sign;
        draw();
      };
      return el("label", {}, el("input", { ...radio, onchange: choose }), el("span", {}, sign));
    }

    function fade() {
      view.opacity = slider.valueAsNumber / 100;
      draw();
    }

    function chooseLayer(value) {
      view.layer = value === "" ? null : Number(value);
      draw();
      if (view.patch !== null) pick(view.patch);
    }

    async function load(url) {
      image.src = url;
      await image.decode().catch(() => null); // what the browser cannot show, the service may still read, or refuse
      photo.hidden = image.naturalWidth === 0;
      const small = Math.min(image.naturalWidth, image.naturalHeight) < 100;
      image.classList.toggle("pixels", small);
      photo.style.setProperty("--ratio", String(image.naturalWidth / image.naturalHeight || 1));
      view.patch = null;
      readout.textContent = HELP;
      return !photo.hidden;
    }

    function show(asked, how) {
      explanation = asked;
      preprocessing = how;
      const split = explanation?.heatmap ?? null;
      panel.hidden = map.hidden = split === null || photo.hidden;
      if (panel.hidden) {
        replace(drawn);
        photo.style.setProperty("--grey", "0");
        return false;
      }
      if (layers.options.length !== split.patches.length + 1) listLayers(split.patches.length);
      map.setAttribute("aria-label", `Heat map of ${split.rows} by ${split.columns} patches: arrow keys read them`);
      outliers.hidden = split.outliers.length === 0;
      draw();
      if (view.patch !== null) pick(view.patch);
      return true;
    }

    function listLayers(count) {
      const each = Array.from({ length: count }, (_, layer) => el("option", { value: layer }, String(layer)));
      layers.replaceChildren(el("option", { value: "" }, "all, added up"), ...each);
      view.layer = null;
    }

    function draw() {
      const split = explanation.heatmap;
      drawMap();
      // So that the map's colours are seen, and not mistaken for the photo's.
      photo.style.setProperty("--grey", String(Math.min(1, 1.25 * view.opacity)));
      replace(scale, legend(split, view));
      replace(adds, addition(split, explanation.ledger.attention, view.layer));
      replace(numbers, table(split, view.layer));
    }

    function drawMap() {
      const [width, height] = [image.naturalWidth, image.naturalHeight];
      const part = seen(width, height, preprocessing);
      replace(drawn, overlay(explanation.heatmap, view, { width, height, seen: part }));
    }

    function step(event) {
      const { rows, columns } = explanation.heatmap;
      const at = view.patch ?? 0;
      const [row, column] = [Math.floor(at / columns), at % columns];
      if (event.key === "Home") pick(row * columns);
      else if (event.key === "End") pick(row * columns + columns - 1);
      else if (event.key in STEPS) {
        const [down, right] = STEPS[event.key];
        pick(between(row + down, rows) * columns + between(column + right, columns));
      } else return;
      event.preventDefault();
    }

    function between(number, count) {
      return Math.min(count - 1, Math.max(0, number));
    }

    function point(event) {
      const { rows, columns } = explanation.heatmap;
      const box = map.getBoundingClientRect();
      const part = seen(image.naturalWidth, image.naturalHeight, preprocessing);
      const x = ((event.clientX - box.left) / box.width) * image.naturalWidth - part.x;
      const y = ((event.clientY - box.top) / box.height) * image.naturalHeight - part.y;
      const [column, row] = [Math.floor((x / part.width) * columns), Math.floor((y / part.height) * rows)];
      if (row >= 0 && row < rows && column >= 0 && column < columns) pick(row * columns + column);
    }

    /** Mark a patch and say what was read there. */
    function pick(index) {
      const split = explanation.heatmap;
      const { target, contrast } = explanation;
      view.patch = Math.min(index, split.total.length - 1);
      drawMap();
      const [row, column] = [Math.floor(view.patch / split.columns) + 1, (view.patch % split.columns) + 1];
      const value = signed(values(split, view.layer)[view.patch]);
      const rather = contrast === null ? "" : ` rather than ${contrast}`;
      const note = split.outliers.includes(view.patch) ? "; an outlier, whose place means little" : "";
      readout.textContent = `Row ${row}, column ${column}: ${value} logits for ${target}${rather}${note}`;
    }

    function layer(number) {
      layers.value = String(number);
      chooseLayer(layers.value);
      photo.scrollIntoView({ block: "nearest" });
    }

    return { load, show, layer };
  }

  Vitrine.photo = { create };
}
